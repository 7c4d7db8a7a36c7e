"""How long a training run has worked, over all of its starts.

A killed start says nothing of its end, so it counts until the last thing that it wrote. Time in a
queue between two starts does not count.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from megatron_mergemix.files.publishing import publish_json

_SIGNS_OF_LIFE = (
    "progress.json",
    "checkpoints/latest_checkpointed_iteration.txt",
    "checkpoints/iter_*",  # of which the tracker file does not tell yet
)


def begin(directory: Path) -> None:
    """Note a start of the run in this folder, and what earlier ones have worked."""
    before = 0.0
    if (record := _read(directory)) is not None:
        seen = [path.stat().st_mtime for name in _SIGNS_OF_LIFE for path in directory.glob(name)]
        before, started = record
        before += max(0.0, max(seen, default=started) - started)
    publish_json(_path(directory), {"seconds_before": before, "started": time.time()})


def worked(directory: Path) -> float:
    """Return the wall seconds of all starts, until now."""
    record = _read(directory)
    if record is None:
        return 0.0
    before, started = record
    return before + max(0.0, time.time() - started)


def _read(directory: Path) -> tuple[float, float] | None:
    path = _path(directory)
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    return record["seconds_before"], record["started"]


def _path(directory: Path) -> Path:
    return directory / "seconds.json"
