"""Boxes that fill a shape exactly, and which of them a region touches."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes, one number per dim."""


class NotTiledError(Exception):
    """The boxes overlap, leave a hole, or reach beyond the shape."""


@dataclass(frozen=True, slots=True)
class _Slabs:
    """Slabs along one dim: where each ends, and what is in it (at the last dim, a box)."""

    ends: list[int]
    inside: list[_Slabs | int]


class Tiling:
    """Boxes that tile a shape: slabs along dim 0, each tiled along dim 1, and so on.

    Every grid is such a tiling, and so is every layout that Megatron shards into. Empty boxes
    count for nothing. Building it takes time proportional to boxes times dims.

    Raises:
        NotTiledError: the boxes do not tile the shape in this way.
    """

    def __init__(self, boxes: Sequence[Box], shape: tuple[int, ...]) -> None:
        if any(len(offsets) != len(shape) or len(sizes) != len(shape) for offsets, sizes in boxes):
            raise NotTiledError
        full = [number for number, (_, sizes) in enumerate(boxes) if 0 not in sizes]
        if 0 in shape and full:
            raise NotTiledError
        self._root = None if 0 in shape else _build(boxes, full, shape, 0)

    def touched(self, offsets: Sequence[int], sizes: Sequence[int]) -> Iterator[int]:
        """Yield the numbers of the boxes that share elements with a region of at least one."""
        if self._root is not None:
            yield from _touched(self._root, offsets, sizes, 0)


def _build(
    boxes: Sequence[Box], numbers: list[int], shape: tuple[int, ...], dim: int
) -> _Slabs | int:
    if dim == len(shape):
        if len(numbers) != 1:
            raise NotTiledError
        return numbers[0]
    slabs = defaultdict(list)
    for number in numbers:
        offsets, sizes = boxes[number]
        slabs[offsets[dim], sizes[dim]].append(number)
    ends, inside, end = [], [], 0
    for (offset, size), members in sorted(slabs.items()):
        if offset != end:
            raise NotTiledError
        end += size
        ends.append(end)
        inside.append(_build(boxes, members, shape, dim + 1))
    if end != shape[dim]:
        raise NotTiledError
    return _Slabs(ends, inside)


def _touched(
    node: _Slabs | int, offsets: Sequence[int], sizes: Sequence[int], dim: int
) -> Iterator[int]:
    if isinstance(node, int):
        yield node
        return
    first = bisect.bisect_right(node.ends, offsets[dim])
    last = bisect.bisect_left(node.ends, offsets[dim] + sizes[dim])
    for inside in node.inside[first : last + 1]:
        yield from _touched(inside, offsets, sizes, dim + 1)
