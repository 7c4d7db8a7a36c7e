"""Whether there is a save to continue from."""

from __future__ import annotations

from pathlib import Path

from megatron_mergemix.checkpoint.saves import TRACKER, complete_saves, resolve
from megatron_mergemix.errors import CheckpointError
from megatron_mergemix.files.publishing import publish_text


def has_save(root: Path) -> bool:
    """Return whether Megatron-LM can continue from the saves in ``root``; every rank may call it.

    Megatron-LM names the newest save in a file that it writes once the save is complete. Where a
    kill came in between, or tore the file, Megatron-LM would end without a word: it is mended.
    """
    saves = complete_saves(root) if root.is_dir() else []
    if not saves:
        return False
    try:
        resolve(root)
    except CheckpointError:
        step, _ = saves[-1]
        publish_text(root / TRACKER, str(step))
    return True
