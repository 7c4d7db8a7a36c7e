"""Whether there is a save to continue from, and whether all ranks see it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from megatron_mergemix.checkpoint.saves import TRACKER, complete_saves, resolve
from megatron_mergemix.errors import CheckpointError
from megatron_mergemix.files.publishing import publish_text
from megatron_mergemix.megatron.device import device


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


def check_same_start(resumes: bool) -> None:
    """Collective: check that all ranks begin at the same place; each has looked for itself.

    On a network file system a node may not see yet what was saved. Megatron-LM would mix its shards
    of the base with those of the others' save, and go on.

    Raises:
        CheckpointError: on every rank, they do not.
    """
    seen = torch.tensor([int(resumes), -int(resumes)], device=device())
    dist.all_reduce(seen, op=dist.ReduceOp.MIN)
    if seen[0].item() != -seen[1].item():
        raise CheckpointError(
            "some ranks see a save to continue from, others see none and would begin at the base: "
            "the file system shows it late to some nodes. Start the same launch again."
        )
