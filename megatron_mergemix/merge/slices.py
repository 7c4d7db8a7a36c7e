"""How the tensors of a checkpoint are cut: for the writer, and for methods that look at a whole.

Megatron stacks the layers of a model into one tensor, and the MoE experts of a layer too. What a
method calls a tensor is one layer's, here called a unit.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_LAYERS = re.compile(r"(?:.*\.)?layers\.(?!\d)")
_EXPERTS = re.compile(r".*\.experts\.experts\.")

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes."""


class Slice(NamedTuple):
    """A box of a tensor that lies in one piece in the new checkpoint.

    Attributes:
        name: of the tensor.
        offsets: of the box in the whole tensor.
        sizes: of the box.
        chunk: number of the output chunk.
        start: first element of the box in the chunk.
    """

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    chunk: int
    start: int


def stacked_dims(name: str) -> int:
    """Return how many leading dims of a tensor count units and not features.

    1 for stacked layers, 2 for stacked layers of stacked MoE experts; a layer or MoE expert with
    its number in the name is a tensor of its own.
    """
    return (_LAYERS.match(name) is not None) + (_EXPERTS.match(name) is not None)


def unit_of(name: str, offsets: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """Return the unit that an element belongs to: tensor, and place in its stacked dims."""
    return name, tuple(offsets[: stacked_dims(name)])


def boxes(sizes: Sequence[int], limit: int, singles: int) -> Iterator[Box]:
    """Cut a shape into boxes that follow one another in row-major order.

    Args:
        sizes: the shape.
        limit: elements of a box, but at least a single one.
        singles: that many leading dims are cut into slices of one.
    """
    if 0 in sizes:
        return
    if not sizes:
        yield (), ()
        return
    dim = next(
        d
        for d in range(min(singles, len(sizes) - 1), len(sizes))
        if math.prod(sizes[d + 1 :]) <= limit or d == len(sizes) - 1
    )
    step = max(1, limit // math.prod(sizes[dim + 1 :])) if dim >= singles else 1
    rest = tuple(sizes[dim + 1 :])
    for outer in itertools.product(*(range(size) for size in sizes[:dim])):
        for begin in range(0, sizes[dim], step):
            size = min(step, sizes[dim] - begin)
            yield (*outer, begin, *(0 for _ in rest)), (*(1 for _ in outer), size, *rest)


def cut_rows(box: Box, first: int, row: int) -> Iterator[Box]:
    """Cut a box that begins at row ``first`` of dim 0 before row ``row``, if it crosses it."""
    offsets, sizes = box
    above = row - first
    if not 0 < above < sizes[0]:
        yield box
        return
    yield offsets, (above, *sizes[1:])
    yield (offsets[0] + above, *offsets[1:]), (sizes[0] - above, *sizes[1:])
