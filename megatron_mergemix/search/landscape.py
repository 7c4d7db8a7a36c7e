"""What the trials say about the whole simplex: one surrogate per capability, one utility."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from megatron_mergemix.evaluate.utility import Scale, Utility
from megatron_mergemix.mixtures.simplex import Array, to_vector
from megatron_mergemix.search.calibration import measurements
from megatron_mergemix.search.ensemble import Ensemble
from megatron_mergemix.search.surrogates.choose import fit_surrogate
from megatron_mergemix.search.surrogates.feature import Fitted, fit_with_feature
from megatron_mergemix.trials import Trial

logger = logging.getLogger(__name__)


class Landscape:
    """The predicted utility of any mixture, learned from measured ones.

    Args:
        trials: successful trials of mixtures, all with scores as on all items.
        domains: their order is the order of all vectors.
        utility: makes one number of the capabilities.
        scale: what the capabilities are measured against.
        surrogate: a name in ``SURROGATES``, or ``auto``.
        ensemble: what the experts' probabilities predict, a feature where it helps; None for none.

    Attributes:
        evidence: capability -> which surrogate it has and its leave-one-out errors, see
            :func:`~megatron_mergemix.search.surrogates.choose.fit_surrogate`, and with an ensemble
            :func:`~megatron_mergemix.search.surrogates.feature.fit_with_feature`.

    Raises:
        SearchError: too few trials for the surrogate.
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        domains: Sequence[str],
        utility: Utility,
        scale: Scale,
        surrogate: str,
        ensemble: Ensemble | None = None,
    ) -> None:
        self.utility, self.scale, self.ensemble = utility, scale, ensemble
        points = np.array([to_vector(trial.mixture, domains) for trial in trials])
        values, stderrs = measurements(trials, utility)
        # Scores on a first share are noisier, and which surrogate predicts them is chance.
        whole = np.array([trial.first is None for trial in trials])
        self._surrogates: list[Fitted] = []
        self.evidence: dict[str, dict[str, Any]] = {}
        for name, scores, errors in zip(utility.capabilities, values.T, stderrs.T, strict=True):
            known = _known(name, errors)
            fitted: Fitted
            if ensemble is None or name not in ensemble.capabilities:
                fitted, evidence = fit_surrogate(surrogate, points, scores, known, whole)
            else:
                feature = partial(ensemble, name)
                fitted, evidence = fit_with_feature(
                    surrogate, points, scores, known, feature, whole
                )
            self.evidence[name] = evidence
            self._surrogates.append(fitted)

    def learned_from(self, trials: Sequence[Trial], domains: Sequence[str]) -> Landscape:
        """Return what other trials teach of the same utility; ``auto`` chooses the surrogates."""
        return Landscape(trials, domains, self.utility, self.scale, "auto", self.ensemble)

    def __call__(self, points: Array) -> Array:
        """Return the predicted utility ``(P,)`` of mixtures ``(P, D)``."""
        means = [surrogate.predict(points)[0] for surrogate in self._surrogates]
        return self.utility.combine(np.stack(means, axis=-1), self.scale)

    def left_out(self) -> Array:
        """Return what is predicted of each fitted trial from all others ``(N, C)``, oriented."""
        return np.stack([surrogate.leave_one_out() for surrogate in self._surrogates], axis=-1)

    def optimistic(self, points: Array, deviations: float) -> Array:
        """Return the utility ``(P,)`` if every capability were that many deviations better.

        A surrogate without deviations of its own counts as exact. Utilities do not fall with any
        capability, so no draw within those deviations is above it.
        """
        bounds = []
        for surrogate in self._surrogates:
            mean, deviation = surrogate.predict(points)
            bounds.append(mean if deviation is None else mean + deviations * deviation)
        return self.utility.combine(np.stack(bounds, axis=-1), self.scale)

    def sample(self, points: Array, num: int, rng: np.random.Generator) -> Array:
        """Return ``num`` joint draws ``(num, P, C)`` of the oriented capability values.

        Of the noise-free scores of mixtures ``(P, D)``, given all trials; capabilities are
        independent of each other.
        """
        return np.stack([s.sample(points, num, rng) for s in self._surrogates], axis=-1)


def _known(capability: str, errors: Array) -> Array | None:
    """Return the standard errors ``(N,)`` of the trials, None where they do not all have one."""
    missing = int(np.sum(~np.isfinite(errors)))
    if missing == 0:
        return errors
    if missing < len(errors):
        logger.warning(
            "capability %s: %d of %d trials have no standard error, so those of the others are "
            "not used: the surrogate learns one noise for all",
            *(capability, missing, len(errors)),
        )
    return None
