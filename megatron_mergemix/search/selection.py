"""Where a predicted utility is highest: the dense search behind every surrogate."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megatron_mergemix.mixtures.simplex import Array, Bounds, project

NUM_SURVIVORS = 50
STEPS = np.geomspace(0.1, 0.001, 15)
"""Lengths of the random steps that refine the optimum, as shares."""


def top_mean(points: Array, predicted: Array, k: int) -> Array:
    """Return the mean of the ``k`` points ``(P, D)`` with the highest prediction ``(P,)``.

    It damps the surrogate's errors, which move a single argmax most (RegMix, arXiv 2407.01492).
    """
    best = np.argsort(-predicted, kind="stable")[:k]
    return np.asarray(points[best].mean(axis=0))


def refined_argmax(
    utility: Callable[[Array], Array],
    points: Array,
    predicted: Array,
    bounds: Bounds,
    rng: np.random.Generator,
    nearest: Callable[[Array], Array] | None = None,
) -> Array:
    """Return the mixture ``(D,)`` within the bounds that maximises ``utility``.

    A dense set is coarse beyond four domains (20,000 points in six dimensions are 5 per axis), so
    its best points are moved by shrinking random steps for as long as the prediction rises.

    Args:
        utility: predicts ``(P,)`` from points ``(P, D)``.
        points: the dense set.
        predicted: ``utility(points)``.
        bounds: every tried point is projected into them.
        rng: draws the steps.
        nearest: projects points where there is more to hold than ``bounds``.
    """
    nearest = nearest or (lambda points: project(points, bounds))
    best = np.argsort(-predicted, kind="stable")[:NUM_SURVIVORS]
    survivors, heights = points[best], predicted[best]
    for step in STEPS:
        for _ in range(3):
            moved = nearest(survivors + step * rng.normal(size=survivors.shape))
            reached = utility(moved)
            better = reached > heights
            survivors = np.where(better[:, None], moved, survivors)
            heights = np.where(better, reached, heights)
    return np.asarray(survivors[int(np.argmax(heights))])
