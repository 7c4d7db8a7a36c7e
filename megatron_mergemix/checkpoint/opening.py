"""Open a checkpoint that can be merged, in whichever format Megatron wrote it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron_mergemix.checkpoint.common_state import read_common
from megatron_mergemix.checkpoint.index import CheckpointIndex
from megatron_mergemix.checkpoint.legacy import (
    LegacyIndex,
    is_legacy,
    legacy_common,
    read_legacy,
)
from megatron_mergemix.checkpoint.metadata import read_index
from megatron_mergemix.checkpoint.saves import TRACKER, check_complete, complete_saves, folder_of


def open_checkpoint(path: Path) -> CheckpointIndex:
    """Return the index of one complete save: ``torch_dist``, or legacy ``torch``.

    Args:
        path: a root with a tracker file, whose newest save is meant, or one iteration's folder.

    Raises:
        CheckpointError: there is no such save, or it is incomplete, damaged, or of another format.
    """
    folder = folder_of(path)
    if is_legacy(folder):
        return read_legacy(folder)
    check_complete(folder)
    return read_index(folder)


def common_of(index: CheckpointIndex) -> dict[str, Any]:
    """Return arguments, iteration and the like as plain values and symbols.

    Raises:
        CheckpointError: they are damaged.
    """
    return legacy_common(index) if isinstance(index, LegacyIndex) else read_common(index)


def all_saves(root: Path) -> list[tuple[int, Path]]:
    """Return the complete saves of both formats under ``root``, as :func:`.saves.complete_saves`.

    Megatron writes the tracker file last: legacy saves that are newer are not complete.

    Raises:
        CheckpointError: ``root`` is not a folder.
    """
    saves = complete_saves(root)
    newest = (root / TRACKER).read_text().strip() if (root / TRACKER).is_file() else ""
    for folder in root.iterdir():
        match = re.fullmatch(r"iter_(\d+)", folder.name)
        if match is None or not folder.is_dir() or not is_legacy(folder):
            continue
        if not newest.isdecimal() or int(match[1]) <= int(newest):
            saves.append((int(match[1]), folder))
    return sorted(saves)
