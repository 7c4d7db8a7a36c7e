"""Which tensors of a legacy checkpoint are copies of another rank's.

Tensor-parallel ranks each hold normalisations whole and a part of every matrix, expert-parallel
ranks each hold everything but MoE experts whole, and the last pipeline stage may hold the
embedding again as its output layer. The files do not tell parts from copies, so the bytes decide:
tensors that may be copies by their names, and are equal in every checkpoint looked at, are.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch

from megatron_mergemix.checkpoint.checks import VOCABULARY_TENSORS
from megatron_mergemix.checkpoint.legacy import LegacyIndex
from megatron_mergemix.checkpoint.reader import CheckpointReader

BLOCK = 1 << 20
"""Elements that are compared in one go."""


def copies(indexes: Sequence[LegacyIndex]) -> set[str]:
    """Return the model tensors that hold, in each of ``indexes``, what an earlier one holds.

    Parts that are equal by chance, such as biases that are still zero, are taken for copies.

    Args:
        indexes: of one layout, with the same tensors.

    Raises:
        CheckpointError: a file cannot be read.
    """
    readers = [CheckpointReader(index) for index in indexes]
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in indexes[0].model_tensors():
        groups[_group(name, indexes[0])].append(name)
    found = set()
    for names in groups.values():
        originals: list[str] = []
        for name in names:
            if any(all(_equal(reader, name, other) for reader in readers) for other in originals):
                found.add(name)
            else:
                originals.append(name)
    return found


def _group(name: str, index: LegacyIndex) -> tuple[str, ...]:
    """Return what copies of a tensor have in common: the pipeline stage, and the name in it."""
    rank, key, tensor = name.split("/", 2)
    if tensor.endswith(VOCABULARY_TENSORS):
        return ("vocabulary",)
    numbers = rank.removeprefix("mp_rank_").split("_")
    stage = numbers[1] if index.sizes["pipeline"] > 1 else ""
    return stage, key, tensor


def _equal(reader: CheckpointReader, name: str, other: str) -> bool:
    ours, theirs = reader.index.tensors[name], reader.index.tensors[other]
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        return False
    if not ours.shape:
        return _same_bytes(reader.read(name), reader.read(other))
    rows = max(1, BLOCK // max(1, math.prod(ours.shape[1:])))
    for begin in range(0, ours.shape[0], rows):
        box = (
            (begin, *(0 for _ in ours.shape[1:])),
            (min(rows, ours.shape[0] - begin), *ours.shape[1:]),
        )
        if not _same_bytes(reader.read(name, *box), reader.read(other, *box)):
            return False
    return True


def _same_bytes(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))
