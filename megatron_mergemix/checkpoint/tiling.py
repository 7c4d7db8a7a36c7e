"""Do boxes fill a shape exactly, without overlap and without a hole?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes, one number per dim."""


def is_tiled(boxes: Sequence[Box], shape: tuple[int, ...]) -> bool:
    """Say whether ``boxes`` tile ``shape``: slabs along dim 0, each tiled along dim 1, and so on.

    This holds for every grid and for every layout that Megatron shards into. Empty boxes count
    for nothing. Takes time proportional to boxes times dims.
    """
    if any(len(offsets) != len(shape) or len(sizes) != len(shape) for offsets, sizes in boxes):
        return False
    if 0 in shape:
        return all(0 in sizes for _, sizes in boxes)
    return _is_tiled([box for box in boxes if 0 not in box[1]], shape, 0)


def _is_tiled(boxes: list[Box], shape: tuple[int, ...], dim: int) -> bool:
    if dim == len(shape):
        return len(boxes) == 1
    slabs = defaultdict(list)
    for offsets, sizes in boxes:
        slabs[offsets[dim], sizes[dim]].append((offsets, sizes))
    end = 0
    for offset, size in sorted(slabs):
        if offset != end:
            return False
        end += size
    return end == shape[dim] and all(_is_tiled(slab, shape, dim + 1) for slab in slabs.values())
