"""Scheffe's canonical quadratic for mixtures, with ridge on the interactions.

``y = sum_i b_i x_i + sum_{i<j} b_ij x_i x_j`` (Scheffe 1958): on the simplex this is the full
quadratic without redundant terms. The ridge shrinks the interactions alone, so a strong one
leaves the linear mixture law and a constant is never shrunk; its strength is the one with the
least leave-one-out error, in closed form (Allen's PRESS). The standard errors are not used:
scores of one evaluator differ little in them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_mergemix.errors import SearchError

Array = NDArray[np.float64]

RIDGES = np.logspace(-8, 3, 45)
"""Strengths that are tried; interactions are at most 1/4, so 1e3 removes them."""


class Quadratic:
    """Ridge regression on Scheffe's canonical quadratic."""

    @staticmethod
    def min_rows(num_domains: int) -> int:
        """Return 1.5 rows per coefficient: below, the optimum is an artefact of the noise."""
        num_coefficients = num_domains + num_domains * (num_domains - 1) // 2
        return -(-3 * num_coefficients // 2)

    def fit(self, points: Array, values: Array, stderrs: Array | None = None) -> None:
        """See :class:`~megatron_mergemix.search.surrogates.surrogate.Surrogate`."""
        num_rows, num_domains = points.shape
        if num_rows < self.min_rows(num_domains):
            raise SearchError(
                f"The quadratic surrogate needs at least {self.min_rows(num_domains)} measured "
                f"mixtures for {num_domains} domains (1.5 per coefficient); got {num_rows}. Raise "
                "search.trials, or use search.surrogate: gp."
            )
        fits = [self._fit_ridge(points, values, ridge) for ridge in RIDGES]
        self.ridge, self._coefficients, self._left_out = min(
            fits, key=lambda fit: float(np.sum((fit[2] - values) ** 2))
        )

    @staticmethod
    def _fit_ridge(points: Array, values: Array, ridge: float) -> tuple[float, Array, Array]:
        """Return the ridge, the coefficients, and the leave-one-out predictions."""
        features = _features(points)
        penalty = np.full(features.shape[1], ridge)
        # A touch on the linear part, so that a domain no point holds is not singular.
        penalty[: points.shape[1]] = 1e-10
        solver = np.linalg.solve(features.T @ features + np.diag(penalty), features.T)
        coefficients = solver @ values
        fitted = features @ coefficients
        leverage = np.minimum(np.einsum("nf,fn->n", features, solver), 1 - 1e-10)
        return ridge, coefficients, values - (values - fitted) / (1 - leverage)

    def predict(self, points: Array) -> tuple[Array, None]:
        """Return the mean ``(P,)``; a ridge fit claims no uncertainty."""
        return _features(points) @ self._coefficients, None

    def leave_one_out(self) -> Array:
        """Return for each fitted row ``(N,)`` its prediction from all others."""
        return self._left_out


def _features(points: Array) -> Array:
    first, second = np.triu_indices(points.shape[1], k=1)
    return np.concatenate([points, points[:, first] * points[:, second]], axis=1)
