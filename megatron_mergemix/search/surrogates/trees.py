"""LightGBM with leaves of a few rows: RegMix's regression (arXiv 2407.01492), fit for a search.

LightGBM's defaults are made for thousands of rows: at least 20 in a leaf and 3 in a histogram bin
leave one constant for all mixtures at 40 trials, without a word. Here a leaf holds two rows, more
from 96 on, a bin holds one, and a tree has four leaves. Trees do not extrapolate and are flat
between their cuts, so their optimum is a plateau; they shine where scores jump.

Trees have no posterior. The uncertainty is the delete-a-group jackknife's (Efron and Tibshirani
1993, chapter 11) of ten refits without a tenth of the rows each, and what the refits' errors on
those rows hold beyond it.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import numpy as np

from megatron_mergemix.errors import SearchError
from megatron_mergemix.mixtures.simplex import Array
from megatron_mergemix.search.surrogates.draws import joint_draws, misfit, missed_surface
from megatron_mergemix.search.surrogates.noise import noise_variance, row_weights

TREES = 200
FOLDS = 10

SETTINGS = {
    "objective": "regression",
    "learning_rate": 0.1,
    "num_leaves": 4,
    "min_data_in_bin": 1,
    "min_sum_hessian_in_leaf": 0.0,
    "deterministic": True,
    "force_row_wise": True,
    "num_threads": 1,
    "seed": 0,
    "verbose": -1,
}


class SmallTrees:
    """Gradient-boosted trees of the package ``lightgbm``, which is imported at the first fit."""

    @staticmethod
    def min_rows(num_domains: int) -> int:
        """Return 16, or two more than domains: fewer leave nothing to split."""
        return max(16, num_domains + 2)

    @staticmethod
    def check_installed() -> None:
        """Check that the package is there, without importing it.

        Raises:
            SearchError: it is not.
        """
        if importlib.util.find_spec("lightgbm") is None:
            raise SearchError(
                "search.surrogate is lightgbm, but the package lightgbm is not installed. Install "
                "it (pip install 'megatron-mergemix[lightgbm]'), or use search.surrogate: auto."
            )

    def fit(self, points: Array, values: Array, stderrs: Array | None = None) -> None:
        """See :class:`~megatron_mergemix.search.surrogates.surrogate.Surrogate`."""
        self.check_installed()
        num_rows, num_domains = points.shape
        if num_rows < self.min_rows(num_domains):
            raise SearchError(
                f"The lightgbm surrogate needs at least {self.min_rows(num_domains)} measured "
                f"mixtures for {num_domains} domains; got {num_rows}. Raise search.trials, or use "
                "search.surrogate: gp."
            )
        self._center, self._spread = values.mean(), values.std() or 1.0
        targets = (values - self._center) / self._spread
        weights = row_weights(stderrs, num_rows) ** 2
        # Rows in an order of their own, so that folds do not depend on who finished first.
        order = np.lexsort((values, *points.T))
        folds = np.empty(num_rows, dtype=np.int64)
        folds[order] = np.arange(num_rows) % FOLDS
        self._model = _train(points, targets, weights)
        self._refits = [
            _train(points[folds != k], targets[folds != k], weights[folds != k])
            for k in range(FOLDS)
        ]
        left_out = np.empty(num_rows)
        for k, refit in enumerate(self._refits):
            left_out[folds == k] = refit.predict(points[folds == k])
        self._left_out = self._center + self._spread * left_out
        unsure = (self._deviations(points) ** 2).sum(axis=0)
        self._misfit = misfit(values - self._left_out, unsure + noise_variance(stderrs))

    def _deviations(self, points: Array) -> Array:
        """Return ``(FOLDS, P)`` whose product with itself is the jackknife's covariance."""
        refits = np.array([refit.predict(points) for refit in self._refits])
        factor = self._spread * np.sqrt((FOLDS - 1) / FOLDS)
        return np.asarray(factor * (refits - refits.mean(axis=0)))

    def _mean(self, points: Array) -> Array:
        return np.asarray(self._center + self._spread * self._model.predict(points))

    def predict(self, points: Array) -> tuple[Array, Array]:
        """Return the trees' sum and the standard deviation of the noise-free score."""
        variance = (self._deviations(points) ** 2).sum(axis=0)
        return self._mean(points), np.sqrt(variance + self._misfit**2)

    def sample(self, points: Array, num: int, rng: np.random.Generator) -> Array:
        """Return draws ``(num, P)`` with the jackknife's covariance and that of the misfit."""
        deviations = self._deviations(points)
        covariance = deviations.T @ deviations + self._misfit**2 * missed_surface(points)
        return joint_draws(self._mean(points), covariance, num, rng)

    def leave_one_out(self) -> Array:
        """Return for each row ``(N,)`` its prediction from the nine tenths it is not in."""
        return self._left_out


def _train(points: Array, targets: Array, weights: Array) -> Any:
    lightgbm = importlib.import_module("lightgbm")
    settings = SETTINGS | {"min_data_in_leaf": max(2, len(points) // 32)}
    rows = lightgbm.Dataset(points, targets, weight=weights, params=settings)
    return lightgbm.train(settings, rows, TREES)
