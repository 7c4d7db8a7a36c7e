"""Run Python where some packages cannot be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# An import hook, and not None in sys.modules: scipy takes an entry there for a loaded torch.
_BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {packages!r}:
            raise ImportError(name + " is blocked here")
sys.meta_path.insert(0, Block())
"""


def run_without(
    packages: Sequence[str], code: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Run ``code`` with ``sys.argv[1:] = arguments`` where importing ``packages`` fails."""
    return subprocess.run(
        [sys.executable, "-c", _BLOCK.format(packages=tuple(packages)) + code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
