"""A search over mixtures that the user names: ``search.points``."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_mergemix.errors import ConfigError
from megatron_mergemix.mixtures.simplex import Array, to_vector, within
from megatron_mergemix.search.design import listed
from megatron_mergemix.search.rounds import RoundStrategy
from megatron_mergemix.trials import Trial


class Fixed(RoundStrategy):
    """A single round: vertices, priors, and the given mixtures."""

    def plan_round(self, number: int, trials: Sequence[Trial]) -> list[tuple[str, Array]]:
        """Return the mixtures, then nothing.

        Raises:
            ConfigError: a given mixture breaks the bounds or ``search.min_share``.
        """
        if number > 0:
            return []
        points = []
        for place, mixture in enumerate(self.settings.points):
            where = f"search.points.{place}"
            point = to_vector(mixture, self.domains, where)
            if not within(point, self.bounds):
                raise ConfigError(
                    f"{where} lies outside of domains.*.bounds, max_epochs or search.min_share; "
                    "such a mixture could not be recommended. Change it, or widen them."
                )
            points.append(("point", point))
        return listed(self.bounds, self.proportional, points)
