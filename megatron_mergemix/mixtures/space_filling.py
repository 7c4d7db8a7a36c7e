"""Mixtures that fill the space between others: each as far as possible from all before it."""

from __future__ import annotations

import numpy as np

from megatron_mergemix.mixtures.levels import Levels
from megatron_mergemix.mixtures.simplex import (
    Array,
    Bounds,
    corners,
    project,
    sample_uniform,
    uniform,
)

NUM_CANDIDATES = 4000
"""Mixtures among which a filling one is looked for."""


DISTINCT = 1e-6
"""Least distance between two mixtures that count as two."""


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
    bounds: Bounds, num: int, seed: int, levels: Levels | None = None
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
        levels: of groups that have bounds of their own; candidates are the nearest within those.
    """
    candidates = sample_uniform(bounds, NUM_CANDIDATES, np.random.default_rng([seed, 6]))
    if levels is not None:
        candidates = levels.project(candidates)
    taken = [*corners(bounds), project(uniform(len(bounds.low)), bounds)]
    return farthest_points(candidates, np.array(taken), num)
