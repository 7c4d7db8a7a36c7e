"""Families of rows as micro-batches, in groups that are run by one call each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np
import torch

from megatron_mergemix.evaluate.families import Family, Row

CALL_COST = 4
"""Micro-batches that a further call of a schedule is worth: stages fill and drain, and
data-parallel ranks get whole micro-batches."""

_LIKE = 0.75
"""Of the longest context in a micro-batch, the least that the shortest has, in tokens."""

_LENGTH_STEP = 8
"""Lengths are multiples of it: tensor cores want it, and sequence parallelism divides it."""


@dataclass(frozen=True)
class Group:
    """Micro-batches that are run alike: of one length, by one call of a pipeline schedule.

    Where rows share their contexts there are several passes over each micro-batch: the first is
    over what the rows of a family begin with, each later one over what is left of one of them.
    These are run a few micro-batches at a time.

    Attributes:
        passes: of every pass int64 ``[M, micro_batch_size, S]``, padded on the right with zeros.
        first: number of its first pass; then come those of its other micro-batches, then the
            second ones.
        begins: how many tokens of each micro-batch's first pass the later ones go on from.
        lengths: of every pass, to which each micro-batch can be cut where they need not be of one
            length.
    """

    passes: tuple[torch.Tensor, ...]
    first: int
    begins: tuple[int, ...]
    lengths: tuple[tuple[int, ...], ...]

    def of_one_length(self, places: Sequence[int]) -> list[int]:
        """Return, of every pass, the length of the longest of these micro-batches."""
        return [max(lengths[place] for place in places) for lengths in self.lengths]

    @property
    def reach(self) -> int:
        """Return how many tokens of a text are passed over at most, padding included."""
        first, *later = (max(lengths) for lengths in self.lengths)
        return max(first, max(self.begins) + max(later, default=0))

    @property
    def keeps(self) -> bool:
        """Return whether later passes go on from what the first one keeps."""
        return len(self.passes) > 1


class Place(NamedTuple):
    """Where a row is run.

    Attributes:
        first: number of its micro-batch's first pass.
        own: number of the pass over what is left of it; the same where it is run by itself.
        begins: tokens that are run in the former, 0 where it is run by itself.
        row: its place within the micro-batch.
    """

    first: int
    own: int
    begins: int
    row: int


class MicroBatch(NamedTuple):
    """Families that are run together: the rows of every pass, and where the later ones go on."""

    families: Sequence[Family]
    passes: list[list[Row]]
    begins: int


def micro_batches(found: Sequence[Family], micro_batch_size: int) -> list[MicroBatch]:
    """Return families, in their order, as micro-batches; those that share nothing come last."""
    sharing = [each for each in found if each.shared]
    alone = [each for each in found if not each.shared]
    parts = [*_of_like_contexts(sharing, micro_batch_size)]
    parts += [alone[n : n + micro_batch_size] for n in range(0, len(alone), micro_batch_size)]
    return [_micro_batch(part) for part in parts]


def _of_like_contexts(found: Sequence[Family], most: int) -> Iterator[Sequence[Family]]:
    """Yield neighbours, none of which would run much of its context again for every row."""
    start = 0
    for end in range(1, len(found) + 1):
        is_full = end - start == most
        if end == len(found) or is_full or found[end].shared < _LIKE * found[start].shared:
            yield found[start:end]
            start = end


def _micro_batch(found: Sequence[Family]) -> MicroBatch:
    begins = min(each.shared for each in found)
    if begins == 0:
        return MicroBatch(found, [[each.rows[0] for each in found]], 0)
    passes = [[each.rows[0][:begins] for each in found]]
    for number in range(len(found[0].rows)):  # the families with fewer rows come last
        passes.append([each.rows[number][begins:] for each in found if number < len(each.rows)])
    return MicroBatch(found, passes, begins)


def grouped(
    batches: Sequence[MicroBatch], max_length: int, micro_batch_size: int
) -> tuple[tuple[Group, ...], dict[Row, Place]]:
    """Return micro-batches in groups, and where every row is run."""
    groups: list[Group] = []
    places: dict[Row, Place] = {}
    first = 0
    for alike in _alike(batches, max_length):
        groups.append(_group(alike, first, max_length, micro_batch_size))
        for number, batch in enumerate(alike, first):
            for place, family in enumerate(batch.families):
                for own, row in enumerate(family.rows, int(batch.begins > 0)):
                    places[row] = Place(number, number + own * len(alike), batch.begins, place)
        first += len(alike) * len(alike[0].passes)
    return tuple(groups), places


def _alike(batches: Sequence[MicroBatch], max_length: int) -> Iterator[Sequence[MicroBatch]]:
    """Yield neighbours that have as many passes; those with one, cut where they get shorter.

    The others are cut to their lengths when they are run, a few at a time.
    """
    for num_passes, run in groupby(batches, key=lambda batch: len(batch.passes)):
        same = list(run)
        if num_passes > 1:
            yield same
            continue
        lengths = [_padded(batch.passes[0], max_length) for batch in same]
        for first, end in pairwise(cuts(lengths)):
            yield same[first:end]


def _group(
    alike: Sequence[MicroBatch], first: int, max_length: int, micro_batch_size: int
) -> Group:
    passes, lengths = [], []
    for rows_of_pass in zip(*(batch.passes for batch in alike), strict=True):
        own = tuple(_padded(rows, max_length) for rows in rows_of_pass)
        tokens = np.zeros((len(alike), micro_batch_size, max(own)), np.int64)
        for number, rows in enumerate(rows_of_pass):
            for place, row in enumerate(rows):
                tokens[number, place, : len(row)] = row
        passes.append(torch.from_numpy(tokens))
        lengths.append(own)
    return Group(tuple(passes), first, tuple(batch.begins for batch in alike), tuple(lengths))


def _padded(rows: Sequence[Row], max_length: int) -> int:
    return min(max_length, -(-max(map(len, rows)) // _LENGTH_STEP) * _LENGTH_STEP)


def cuts(lengths: Sequence[int]) -> list[int]:
    """Return where to cut micro-batches of falling length, so that the padded work is least.

    Every group is padded to its first length and costs ``CALL_COST`` micro-batches more. The
    bounds do not depend on the layout, so neither does what is in a forward pass.
    """
    firsts = [n for n, length in enumerate(lengths) if n == 0 or lengths[n - 1] != length]
    ends = [*firsts, len(lengths)]
    least = [0.0] * (len(firsts) + 1)
    cut = [0] * len(firsts)
    for begin in reversed(range(len(firsts))):
        length = lengths[firsts[begin]]
        costs = [
            (ends[end] - ends[begin] + CALL_COST) * length + least[end]
            for end in range(begin + 1, len(firsts) + 1)
        ]
        least[begin] = min(costs)
        cut[begin] = begin + 1 + costs.index(least[begin])
    bounds, place = [0], 0
    while place < len(firsts):
        place = cut[place]
        bounds.append(ends[place])
    return bounds
