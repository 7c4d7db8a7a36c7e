"""Bayesian optimisation: a few spread mixtures, then those that may be better than all others.

The outer loop of DUET (arXiv 2502.00270), which learns from feedback alone. Mixtures are chosen in
batches by upper confidence bounds. A batch is chosen jointly (Wilson, Hutter and Deisenroth,
arXiv 1805.10196): what counts of a mixture is by how much it raises the expected highest bound of
the batch, so that its members do not repeat each other. The recommendation is not the highest
measurement but the optimum of the posterior mean, see :mod:`megatron_mergemix.search.rounds`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_mergemix.mixtures.simplex import Array, dense_points, project, to_vector
from megatron_mergemix.search.design import spread
from megatron_mergemix.search.landscape import Landscape
from megatron_mergemix.search.rounds import RoundStrategy
from megatron_mergemix.search.selection import refined_argmax
from megatron_mergemix.trials import Trial

BETA = 4.0
"""Of the bound ``mean + sqrt(BETA) * deviation``: two standard deviations."""

FIRST = 0.5
"""Part of the trials that are spread out before any is chosen."""

NUM_POOL, NUM_SHORTLIST, NUM_DRAWS = 4000, 300, 128
"""Mixtures that are looked at, those of them that are drawn jointly, and how often."""

NEAR = np.array([0.02, 0.05, 0.1, 0.2])
"""Distances from the predicted optimum at which the pool is denser, as shares."""


class Bayesian(RoundStrategy):
    """A spread design, then batches of the mixtures with the highest upper confidence bounds."""

    def plan_round(self, number: int, trials: Sequence[Trial]) -> list[tuple[str, Array]]:
        """Return the design, then batches until ``search.trials`` are used up."""
        settings, first = self.settings, self._size_of_design()
        if number == 0:
            return spread(self.bounds, self.proportional, first, settings.seed)
        left = settings.trials - first - (number - 1) * settings.batch
        if left <= 0:
            return []
        rng = np.random.default_rng([settings.seed, 11, number])
        landscape = self.landscape(trials)
        tried = [*trials, *self._explored(failed=True)]
        pool = self._shortlist(landscape, tried, rng)
        batch = _joint_bounds(self._draws(landscape, pool, rng), min(settings.batch, left))
        return [(f"round:{number + 1}", pool[place]) for place in batch]

    def _size_of_design(self) -> int:
        """Return the trials of the design."""
        least = len(self.domains) + 4
        return min(self.settings.trials, max(least, round(FIRST * self.settings.trials)))

    def _draws(self, landscape: Landscape, points: Array, rng: np.random.Generator) -> Array:
        values = landscape.sample(points, NUM_DRAWS, rng)
        return landscape.utility.combine(values, landscape.scale) + self.preference(points)

    def _shortlist(
        self, landscape: Landscape, tried: Sequence[Trial], rng: np.random.Generator
    ) -> Array:
        """Return new mixtures that are promising: where all capabilities are at their best."""

        def worth(points: Array) -> Array:
            return landscape(points) + self.preference(points)

        points = dense_points(self.bounds, rng, NUM_POOL)
        best = refined_argmax(worth, points, worth(points), self.bounds, rng)
        steps = np.repeat(NEAR, 75)[:, None] * rng.normal(size=(75 * len(NEAR), len(best)))
        points = np.concatenate([best[None], project(best + steps, self.bounds), points])
        measured = np.array([to_vector(trial.mixture, self.domains) for trial in tried])
        apart = np.abs(points[:, None, :] - measured[None, :, :]).max(axis=2).min(axis=1)
        points = points[apart > 1e-3]
        bound = landscape.optimistic(points, np.sqrt(BETA)) + self.preference(points)
        return points[np.argsort(-bound, kind="stable")[:NUM_SHORTLIST]]


def _joint_bounds(draws: Array, num: int) -> list[int]:
    """Return the columns whose highest bound together is expected to be highest, greedily.

    A Gaussian's upper bound is the mean of ``mean + sqrt(beta pi / 2) |draw - mean|`` (arXiv
    1805.10196, table 1); for several, the mean of the maximum.

    Args:
        draws: joint draws ``(N, P)``.
        num: of columns.
    """
    mean = draws.mean(axis=0)
    bounds = mean + np.sqrt(BETA * np.pi / 2) * np.abs(draws - mean)
    highest = np.full(len(draws), -np.inf)
    chosen: list[int] = []
    for _ in range(min(num, draws.shape[1])):
        reached = np.maximum(highest[:, None], bounds).mean(axis=0)
        reached[chosen] = -np.inf
        chosen.append(int(np.argmax(reached)))
        highest = np.maximum(highest, bounds[:, chosen[-1]])
    return chosen
