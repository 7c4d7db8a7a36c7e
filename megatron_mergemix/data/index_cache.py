"""Index files that Megatron builds of a dataset, and that a killed start has torn."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def remove_torn(cache: Path) -> None:
    """Remove index files of a start that was killed while it wrote them.

    Megatron takes every file that is there for a whole one; what is missing it builds again.
    """
    for path in cache.glob("*.npy"):
        try:
            np.load(path, mmap_mode="r")
        except (ValueError, EOFError):
            path.unlink()
