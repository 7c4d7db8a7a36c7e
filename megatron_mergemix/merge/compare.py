"""How experts differ from their base and from each other, read block by block."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from typing import Any

import torch

from megatron_mergemix.checkpoint.checks import check_compatible
from megatron_mergemix.checkpoint.index import CheckpointIndex
from megatron_mergemix.checkpoint.legacy import LegacyIndex, check_layouts
from megatron_mergemix.checkpoint.reader import CheckpointReader
from megatron_mergemix.merge.copies import copies
from megatron_mergemix.merge.engine import FLOATS, in_threads
from megatron_mergemix.merge.scan import BLOCK
from megatron_mergemix.merge.slices import boxes


def compare(indexes: Sequence[CheckpointIndex]) -> dict[str, Any]:
    """Return norms and cosines of the task vectors, and the update sizes, as JSON values.

    Legacy checkpoints are compared over the files of all ranks, copies counted once.

    Args:
        indexes: the base, then the experts.

    Returns:
        ``names``: paths of the experts; ``norms``: per expert, group -> norm of the task vector;
        ``cosines``: ``[K][K]``, None where a task vector is zero; ``delta``: per expert
        ``sum |expert - base| / (sum |expert| + sum |base|)``.

    Source: DeMix (arXiv 2602.00747) for delta.
    """
    base, *experts = indexes
    check_layouts(base, {str(index.path): index for index in experts})
    check_compatible(base, {str(index.path): index for index in experts})
    readers = [CheckpointReader(index) for index in indexes]
    tensors = [name for name, t in base.model_tensors().items() if t.dtype in FLOATS]
    legacy = [index for index in indexes if isinstance(index, LegacyIndex)]
    counted_already = copies(legacy) if legacy else set()
    tensors = [name for name in tensors if name not in counted_already]
    sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    lock = threading.Lock()

    def work(name: str) -> None:
        products = torch.zeros(len(experts), len(experts), dtype=torch.float64)
        sizes = torch.zeros(len(experts), 2, dtype=torch.float64)
        for box in boxes(base.tensors[name].shape, BLOCK, 0):
            origin, *others = (reader.read(name, *box).view(-1).double() for reader in readers)
            deltas = torch.stack([other - origin for other in others])
            products += deltas @ deltas.T
            scale = origin.abs().sum()
            sizes[:, 0] += deltas.abs().sum(1)
            sizes[:, 1] += torch.stack([other.abs().sum() + scale for other in others])
        with lock:
            sums[name] = (products, sizes)

    in_threads(min(8, os.cpu_count() or 1), work, tensors)
    total = sum((sums[name][0] for name in tensors), torch.zeros(len(experts), len(experts)))
    changed, size = sum((sums[name][1] for name in tensors), torch.zeros(len(experts), 2)).T
    groups = sorted({group_of(name) for name in tensors})
    return {
        "names": [str(index.path) for index in experts],
        "norms": [
            {
                group: math.sqrt(
                    sum(float(sums[n][0][k, k]) for n in tensors if group_of(n) == group)
                )
                for group in groups
            }
            | {"all": math.sqrt(float(total[k, k]))}
            for k in range(len(experts))
        ],
        "cosines": [
            [_cosine(total, i, j) for j in range(len(experts))] for i in range(len(experts))
        ],
        "delta": [float(c / s) if s else 0.0 for c, s in zip(changed, size, strict=True)],
    }


def _cosine(products: torch.Tensor, i: int, j: int) -> float | None:
    lengths = math.sqrt(float(products[i, i]) * float(products[j, j]))
    return max(-1.0, min(1.0, float(products[i, j]) / lengths)) if lengths else None


def group_of(name: str) -> str:
    """Return the part of the model that a tensor belongs to, for tables."""
    kinds = (
        ("router", "MoE router"),
        ("experts", "MoE experts"),
        ("embedding", "embedding"),
        ("output_layer", "output layer"),
        ("norm", "normalisation"),
        ("attention", "attention"),
        ("mlp", "MLP"),
    )
    return next((group for part, group in kinds if part in name), "other")
