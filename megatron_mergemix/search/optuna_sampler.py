"""An adapter: a sampler of Optuna proposes, everything else is as in the other strategies.

A mixture is a trial of Optuna with one number per domain. What a sampler proposes is projected
onto the mixtures within the bounds, and it is told what was really measured. The study is built
anew from the journal for every batch, so nothing of Optuna's has to be stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_mergemix.errors import ConfigError
from megatron_mergemix.mixtures.simplex import Array, project, to_mixture, to_vector
from megatron_mergemix.search.calibration import utility_scale
from megatron_mergemix.search.design import spread
from megatron_mergemix.search.purposes import is_race
from megatron_mergemix.search.rounds import RoundStrategy
from megatron_mergemix.trials import Trial


class OptunaSampler(RoundStrategy):
    """A spread design, then batches that a sampler of Optuna proposes (``search.sampler``)."""

    def plan_round(self, number: int, trials: Sequence[Trial]) -> list[tuple[str, Array]]:
        """Return the design, then batches until ``search.trials`` are used up.

        Raises:
            ConfigError: Optuna is not installed.
        """
        optuna = _optuna()
        settings, first = self.settings, self._size_of_design()
        if number == 0:
            return spread(self.bounds, self.proportional, first, settings.seed)
        left = self._left(number)
        if left <= 0:
            return []
        shares = {name: optuna.distributions.FloatDistribution(0.0, 1.0) for name in self.domains}
        seed = int(np.random.default_rng([settings.seed, 12, number]).integers(2**31))
        study = optuna.create_study(direction="maximize", sampler=_sampler(optuna, settings, seed))
        for mixture, value in self._told(trials):
            study.add_trial(
                optuna.trial.create_trial(params=mixture, distributions=shares, value=value)
            )
        asked = [study.ask(shares).params for _ in range(min(settings.batch, left))]
        points = np.array([[params[name] for name in self.domains] for params in asked])
        return [(f"round:{number + 1}", point) for point in project(points, self.bounds)]

    def mixtures_to_come(self) -> int:
        """Return the mixtures of all batches to come: nothing is fitted before the last one."""
        return max(0, self._left(sum(not is_race(round_[0].purpose) for round_ in self._rounds)))

    def _left(self, number: int) -> int:
        """Return how many mixtures are left for a round and those after it."""
        settings = self.settings
        return settings.trials - self._size_of_design() - (number - 1) * settings.batch

    def _size_of_design(self) -> int:
        """Return the trials of the design."""
        return min(self.settings.trials, len(self.domains) + 4)

    def _told(self, trials: Sequence[Trial]) -> list[tuple[dict[str, float], float]]:
        """Return what is maximised, utility and preference, of every measured mixture."""
        scale = utility_scale(self.utility, trials)
        points = np.array([to_vector(trial.mixture, self.domains) for trial in trials])
        preferred = self.preference(points)
        return [
            (
                to_mixture(np.clip(point, 0.0, 1.0), self.domains),
                self.utility.of_trial(trial.scores, scale).value + float(extra),
            )
            for point, trial, extra in zip(points, trials, preferred, strict=True)
        ]


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            "search.strategy: optuna needs Optuna, which is not installed: "
            "pip install 'megatron-mergemix[optuna]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _sampler(optuna: Any, settings: Any, seed: int) -> Any:
    # A batch is asked for at once; tpe then takes its members for as bad as the worst so far.
    samplers = {
        "tpe": lambda: optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=0, multivariate=True, constant_liar=True
        ),
        "gp": lambda: optuna.samplers.GPSampler(seed=seed, n_startup_trials=0),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
    }
    return samplers[settings.sampler]()
