"""The plainest search: the finest lattice of the simplex within ``search.trials``."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_mergemix.mixtures.simplex import Array
from megatron_mergemix.search.design import grid
from megatron_mergemix.search.rounds import RoundStrategy
from megatron_mergemix.trials import Trial


class Grid(RoundStrategy):
    """A single round: vertices, priors, lattice. It may leave trials over."""

    def plan_round(self, number: int, trials: Sequence[Trial]) -> list[tuple[str, Array]]:
        """Return the lattice, then nothing."""
        return grid(self.bounds, self.proportional, self.settings.trials) if number == 0 else []
