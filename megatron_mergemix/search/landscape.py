"""What the trials say about the whole simplex: one surrogate per capability, one utility."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_mergemix.evaluate.utility import Scale, Utility
from megatron_mergemix.journal import Trial
from megatron_mergemix.search.calibration import measurements
from megatron_mergemix.search.surrogates.choose import fit_surrogate
from megatron_mergemix.simplex import Array, to_vector


class Landscape:
    """The predicted utility of any mixture, learned from measured ones.

    Args:
        trials: successful trials of mixtures.
        domains: their order is the order of all vectors.
        utility: makes one number of the capabilities.
        scale: what the capabilities are measured against.
        surrogate: a name in ``SURROGATES``, or ``auto``.

    Attributes:
        evidence: capability -> which surrogate it has and its leave-one-out errors, see
            :func:`~megatron_mergemix.search.surrogates.choose.fit_surrogate`.

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
    ) -> None:
        self.utility, self.scale = utility, scale
        points = np.array([to_vector(trial.mixture, domains) for trial in trials])
        values, stderrs = measurements(trials, utility)
        self._surrogates = []
        self.evidence: dict[str, dict[str, Any]] = {}
        for name, scores, errors in zip(utility.capabilities, values.T, stderrs.T, strict=True):
            known = errors if np.isfinite(errors).all() else None
            fitted, self.evidence[name] = fit_surrogate(surrogate, points, scores, known)
            self._surrogates.append(fitted)

    def __call__(self, points: Array) -> Array:
        """Return the predicted utility ``(P,)`` of mixtures ``(P, D)``."""
        means = [surrogate.predict(points)[0] for surrogate in self._surrogates]
        return self.utility.combine(np.stack(means, axis=-1), self.scale)
