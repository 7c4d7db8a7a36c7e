"""Mixtures that fill the space between others: each as far as possible from all before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mergemix.simplex import (
    TOLERANCE,
    Array,
    Bounds,
    corners,
    project,
    sample_uniform,
    uniform,
)

NUM_CANDIDATES = 4000
"""Mixtures among which a filling one is looked for."""

DRAWN_PER_POINT = 20
"""Mixtures that are drawn for each that is wanted, where bounds of groups may refuse some."""

DISTINCT = 1e-6
"""Least distance between two mixtures that count as two."""


class GroupBounds(NamedTuple):
    """Least and largest total share of some domains, given by their places."""

    places: Sequence[int]
    low: float
    high: float


def spread_points(
    bounds: Bounds, num: int, rng: np.random.Generator, groups: Sequence[GroupBounds] = ()
) -> Array:
    """Return up to ``num`` mixtures ``(N, D)`` spread evenly within all bounds.

    Fewer where the bounds of groups leave little of what those of the domains do.
    """
    if not groups:
        return sample_uniform(bounds, num, rng)
    points = sample_uniform(bounds, DRAWN_PER_POINT * num, rng)
    return points[_within_groups(points, groups)][:num]


def _within_groups(points: Array, groups: Sequence[GroupBounds]) -> NDArray[np.bool_]:
    held = np.ones(len(points), dtype=np.bool_)
    for group in groups:
        total = points[:, list(group.places)].sum(axis=1)
        held &= (total >= group.low - TOLERANCE) & (total <= group.high + TOLERANCE)
    return held


def farthest_points(candidates: Array, taken: Array, num: int) -> list[Array]:
    """Return up to ``num`` candidates, each the farthest from all before (greedy maximin).

    Fewer where the others coincide with what is taken.

    Args:
        candidates: ``(P, D)``.
        taken: points that are there already ``(T, D)``, at least one.
        num: how many are wanted.
    """
    distance = np.linalg.norm(candidates[:, None, :] - taken[None, :, :], axis=2).min(axis=1)
    chosen: list[Array] = []
    while len(chosen) < num:
        farthest = int(np.argmax(distance))
        if distance[farthest] < DISTINCT:
            break
        chosen.append(candidates[farthest])
        distance = np.minimum(distance, np.linalg.norm(candidates - chosen[-1], axis=1))
    return chosen


def filling_mixtures(
    bounds: Bounds, num: int, seed: int, groups: Sequence[GroupBounds] = ()
) -> list[Array]:
    """Return up to ``num`` mixtures ``(D,)`` spread over the region within the bounds.

    Candidates are drawn evenly by volume, so the chosen stand for the mixtures that are possible
    rather than for their edges. The corners count as taken: an expert is there, or nearly, and
    what is to be told is how merges do between them. So does the uniform mixture, which is always
    a reference. More of them begin with the same ones.

    Args:
        bounds: of all mixtures that count as possible.
        num: how many are wanted; fewer where the bounds leave no more distinct ones.
        seed: of the candidates.
        groups: those that have bounds of their own.
    """
    candidates = spread_points(bounds, NUM_CANDIDATES, np.random.default_rng([seed, 6]), groups)
    if len(candidates) == 0:
        return []
    taken = [*corners(bounds), project(uniform(len(bounds.low)), bounds)]
    return farthest_points(candidates, np.array(taken), num)
