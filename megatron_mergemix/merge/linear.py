"""Linear merging: a weighted sum of flat tensors, accumulated in fp32, rounded once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_mergemix.merge import kernel

BLOCK = 1 << 17
"""Elements per block on a CPU: fp32 accumulator and sources of one block stay in the cache."""

GPU_BLOCK = 1 << 24
"""Elements per block on a GPU: the work of a block outweighs the launch of its kernels."""

_NEGLIGIBLE = 1e-12


def block_size(device: torch.device) -> int:
    """Return the elements that are worked on at a time on a device."""
    return BLOCK if device.type == "cpu" else GPU_BLOCK


def base_weight(weights: Sequence[float]) -> float:
    """Return what the base weighs in ``base + sum_k w_k (expert_k - base)``: ``1 - sum_k w_k``.

    Rounding residue of weights that sum to one is not weighed, so that the base drops out.
    """
    weight = 1.0 - sum(weights)
    return 0.0 if abs(weight) < _NEGLIGIBLE else weight


def weighted_sum_(
    out: torch.Tensor,
    sources: Sequence[torch.Tensor],
    weights: Sequence[float],
    accumulator: torch.Tensor,
) -> None:
    """Write ``sum_i weights[i] * sources[i]`` into ``out``, in place.

    Elementwise, so the result does not depend on how tensors are cut over ranks. Sources of
    weight zero are not read, and a single source of weight one is copied bit for bit.

    Args:
        out: contiguous 1-D, any float dtype; keeps its storage.
        sources: 1-D, of ``out``'s length and device, any float dtype.
        weights: one per source, used as given.
        accumulator: float32 on ``out``'s device, where the compiled kernel does not serve. Its
            length, at least 1, is that of the blocks; see :func:`block_size`.

    Source: Model soups (arXiv 2203.05482), Sec. 2; MergeMix (arXiv 2601.17858), Sec. 3.2.
    """
    used = [(s, w) for s, w in zip(sources, weights, strict=True) if w != 0.0]
    if not used:
        out.zero_()
        return
    if len(used) == 1 and used[0][1] == 1.0:
        out.copy_(used[0][0])
        return
    if kernel.takes(out, *(source for source, _ in used)):
        kernel.weighted_sum(out, *zip(*used, strict=True))
        return
    block = len(accumulator)
    for start in range(0, out.numel(), block):
        stop = min(start + block, out.numel())
        total = accumulator[: stop - start]
        (first, weight), *rest = used
        torch.mul(first[start:stop].float(), weight, out=total)
        for source, weight in rest:
            total.add_(source[start:stop].float(), alpha=weight)
        out[start:stop].copy_(total)
