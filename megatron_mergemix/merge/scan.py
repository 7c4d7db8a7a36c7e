"""What a method must know about a whole unit before it can merge slices of it.

A unit is read in blocks of a fixed size, in order, by one thread: the result depends neither on
the chunks of the checkpoint nor on how many workers there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_mergemix.merge.methods import Recipe, Unit
from megatron_mergemix.merge.slices import boxes, stacked_dims
from megatron_mergemix.merge.sphere import spherical_weights

BLOCK = 1 << 20
"""Elements that are read in one go."""

Blocks = Callable[[], Iterator[Sequence[Tensor]]]
"""Gives the unit's blocks from the start: sources, flat, in their stored dtypes."""


def unit_boxes(
    place: tuple[int, ...], shape: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield the boxes of one unit of a tensor of ``shape``, in order."""
    for offsets, sizes in boxes(shape[len(place) :], BLOCK, 0):
        yield (*place, *offsets), (*(1 for _ in place), *sizes)


def units(name: str, shape: Sequence[int]) -> Iterator[Unit]:
    """Yield the units of a tensor."""
    stacked = shape[: stacked_dims(name)]
    for number in range(math.prod(stacked)):
        place = []
        for size in reversed(stacked):
            number, coordinate = divmod(number, size)
            place.append(coordinate)
        yield name, tuple(reversed(place))


def products(recipe: Recipe, blocks: Blocks) -> list[float]:
    """Return the coefficients of the spherical mean of the experts.

    Units without a direction, such as biases that are still zero, are averaged linearly.
    """
    total = torch.zeros(len(recipe.weights), len(recipe.weights), dtype=torch.float64)
    for sources in blocks():
        block = torch.stack([source.double() for source in sources])
        total += block @ block.T
    coefficients = spherical_weights(total.numpy(), recipe.weights)
    return list(recipe.weights) if coefficients is None else coefficients.tolist()


def thresholds(recipe: Recipe, blocks: Blocks) -> list[float]:
    """Return the magnitude of the smallest change that is kept, per expert.

    Exact: the k-th largest of ``|expert - base|`` in fp32, k = ``density`` of the unit's
    elements, found by counting the upper and then the lower half of its bits.
    """
    upper = _counts(blocks, len(recipe.weights), 15, lambda bits, expert: bits >> 16)
    size = int(upper[0].sum())
    keep = max(1, min(size, round(recipe.density * size)))
    heads, left = [], []
    for counts in upper:
        above = counts.flip(0).cumsum(0)
        position = int(torch.searchsorted(above, keep))
        heads.append(len(counts) - 1 - position)
        left.append(keep - (int(above[position - 1]) if position else 0))

    def lower_half(bits: Tensor, expert: int) -> Tensor:
        return bits[(bits >> 16) == heads[expert]] & 0xFFFF

    found = []
    for head, rest, counts in zip(
        heads, left, _counts(blocks, len(heads), 16, lower_half), strict=True
    ):
        position = int(torch.searchsorted(counts.flip(0).cumsum(0), rest))
        bits = (head << 16) | (len(counts) - 1 - position)
        found.append(torch.tensor([bits], dtype=torch.int32).view(torch.float32).item())
    return found


def _counts(
    blocks: Blocks, experts: int, width: int, select: Callable[[Tensor, int], Tensor]
) -> list[Tensor]:
    counts = [torch.zeros(1 << width, dtype=torch.int64) for _ in range(experts)]
    for base, *sources in blocks():
        origin = base.float()
        for number, source in enumerate(sources):
            bits = (source.float() - origin).abs_().view(torch.int32)
            counts[number] += torch.bincount(select(bits, number), minlength=1 << width)
    return counts


SCANS: dict[str, Callable[[Recipe, Blocks], Any]] = {
    "products": products,
    "thresholds": thresholds,
}
"""Name -> scan of one unit, given its blocks: experts, after the base if it is read."""
