"""Rounds that close in on what the rounds before predict to be best.

Nemotron-CLIMB (arXiv 2504.13161) and DeMix (arXiv 2602.00747, section 3.3) search so with rounds
of 64, 32 and 16 models: each later round is drawn at random from the best predicted mixtures. The
random draw keeps a round from measuring one hill-top many times, and a surrogate's error at one
place from taking the whole round.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_mergemix.mixtures.simplex import Array, dense_points, to_vector
from megatron_mergemix.search.design import design
from megatron_mergemix.search.rounds import RoundStrategy
from megatron_mergemix.search.verdict import is_same
from megatron_mergemix.trials import Trial

BEST = 0.05
"""Part of a dense set of mixtures that later rounds are drawn from."""

SPLIT = (4, 2, 1)
"""Proportions of the rounds where ``search.rounds`` gives none: those of 64, 32 and 16."""


class Iterative(RoundStrategy):
    """A design, then rounds drawn from the best predicted mixtures."""

    def plan_round(self, number: int, trials: Sequence[Trial]) -> list[tuple[str, Array]]:
        """Return the design, and for every later round mixtures from among the best."""
        settings, sizes = self.settings, self.sizes()
        if number == 0:
            setting = self.setting_of_first_fit()
            return design(self.bounds, self.proportional, sizes[0], settings.seed, setting)
        if number >= len(sizes):
            return []
        landscape = self.landscape(trials)
        rng = np.random.default_rng([settings.seed, 10, number])
        points = dense_points(self.bounds, rng)
        order = np.argsort(-(landscape(points) + self.preference(points)), kind="stable")
        best = points[order[: max(int(BEST * len(points)), 2 * sizes[number])]]
        tried = [*trials, *self._explored(failed=True)]
        measured = [to_vector(trial.mixture, self.domains) for trial in tried]
        chosen: list[Array] = []
        for point in best[rng.permutation(len(best))]:
            if len(chosen) == sizes[number]:
                break
            if not any(is_same(point, other) for other in (*measured, *chosen)):
                chosen.append(point)
        return [(f"round:{number + 1}", point) for point in chosen]

    def sizes(self) -> list[int]:
        """Return the trials of every round; the first holds what the design and a fit need."""
        if self.settings.rounds:
            return list(self.settings.rounds)
        total = self.settings.trials
        first = max(round(total * SPLIT[0] / sum(SPLIT)), min(total, len(self.domains) + 3))
        second = round((total - first) * SPLIT[1] / (SPLIT[1] + SPLIT[2]))
        return [size for size in (first, second, total - first - second) if size > 0]

    def setting_of_first_fit(self) -> str:
        """Return the setting that gives the trials of the first round."""
        return "search.rounds[0]" if self.settings.rounds else "search.trials"
