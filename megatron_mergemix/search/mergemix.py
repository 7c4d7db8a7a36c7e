"""The paper's search (arXiv 2601.17858, section 3.2): one design, one fit, a verified optimum."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_mergemix.mixtures.simplex import Array
from megatron_mergemix.search.design import design
from megatron_mergemix.search.rounds import RoundStrategy
from megatron_mergemix.trials import Trial


class MergeMix(RoundStrategy):
    """A single round: a fixed design of ``search.trials`` mixtures."""

    def plan_round(self, number: int, trials: Sequence[Trial]) -> list[tuple[str, Array]]:
        """Return the design, then nothing."""
        if number > 0:
            return []
        settings = self.settings
        return design(self.bounds, self.proportional, settings.trials, settings.seed)
