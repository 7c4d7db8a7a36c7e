"""What other items would have scored: the part of the noise that trials share.

All trials are scored on the same items, so the scores hide how much depends on those items: what
makes an item hard for every mixture cancels in comparisons, and what makes it hard for some does
not. Where trials keep their per-item scores both are known: drawing other items of the same kind
changes the scores of the N trials by jointly normal deviations, whose covariance is that of
the items over the trials divided by their number (the paired standard error of
:meth:`~megatron_mergemix.evaluate.utility.Utility.gain`, for all pairs at once).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_mergemix.evaluate.utility import Utility
from megatron_mergemix.mixtures.simplex import Array, to_vector
from megatron_mergemix.search.surrogates.draws import joint_draws
from megatron_mergemix.trials import Trial

RIDGE = 1e-4
"""Of the map from the deviations at the trials to those elsewhere; it has no noise to smooth."""


class OtherItems:
    """Draws by how much capabilities would differ on other items, jointly at any mixtures.

    Between the trials an item's score is taken as a quadratic of the mixture (kernel ridge
    regression, whose kernel spans Scheffe's quadratic without asking for as many rows).

    Args:
        trials: successful trials of mixtures.
        domains: their order is the order of all vectors.
        utility: names the metrics of every capability.

    Attributes:
        known: the capabilities of which every trial has its items; the others do not deviate.
    """

    def __init__(self, trials: Sequence[Trial], domains: Sequence[str], utility: Utility) -> None:
        self._points = np.array([to_vector(trial.mixture, domains) for trial in trials])
        self._covariances = [
            _covariance([_items(trials, name, metric) for metric in metrics])
            for name, metrics in utility.objective.items()
        ]
        self.known = [
            name
            for name, covariance in zip(utility.capabilities, self._covariances, strict=True)
            if covariance is not None
        ]
        self._gram = _kernel(self._points, self._points)
        self._gram[np.diag_indices(len(trials))] += RIDGE

    def sample(self, points: Array, num: int, rng: np.random.Generator) -> Array:
        """Return ``num`` joint draws ``(num, P, C)`` of the deviations at mixtures ``(P, D)``."""
        spread = np.linalg.solve(self._gram, _kernel(self._points, points))  # (N, P)
        draws = np.zeros((num, len(points), len(self._covariances)))
        for index, covariance in enumerate(self._covariances):
            if covariance is not None:
                at_trials = joint_draws(np.zeros(len(covariance)), covariance, num, rng)
                draws[..., index] = at_trials @ spread
        return draws


def _items(trials: Sequence[Trial], capability: str, metric: str) -> Array | None:
    """Return the oriented scores of all items ``(N, items)``, None where some are not known."""
    scores = [trial.scores[capability][metric] for trial in trials]
    count = len(scores[0].items)
    if count < 2 or any(len(score.items) != count for score in scores):
        return None
    sign = 1.0 if scores[0].higher_is_better else -1.0
    return sign * np.array([score.items for score in scores])


def _covariance(metrics: Sequence[Array | None]) -> Array | None:
    """Return the covariance ``(N, N)`` of the mean over the metrics, which have their own items."""
    total = 0.0
    for items in metrics:
        if items is None:
            return None
        centered = items - items.mean(axis=1, keepdims=True)
        count = items.shape[1]
        total = total + centered @ centered.T / (count * (count - 1))
    return np.asarray(total / len(metrics) ** 2)


def _kernel(points: Array, others: Array) -> Array:
    return np.asarray((1.0 + points @ others.T) ** 2)
