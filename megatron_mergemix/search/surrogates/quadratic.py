"""Scheffe's canonical quadratic for mixtures, with ridge on the interactions.

``y = sum_i b_i x_i + sum_{i<j} b_ij x_i x_j`` (Scheffe 1958): on the simplex this is the full
quadratic without redundant terms. The ridge shrinks the interactions alone, so a strong one
leaves the linear mixture law and a constant is never shrunk; its strength is the one with the
least leave-one-out error, in closed form (Allen's PRESS). Rows weigh by their standard errors.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from megatron_mergemix.errors import SearchError
from megatron_mergemix.mixtures.simplex import Array
from megatron_mergemix.search.surrogates.draws import joint_draws, misfit, missed_surface
from megatron_mergemix.search.surrogates.noise import noise_variance, row_weights

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
        weights = row_weights(stderrs, num_rows)
        best = min(
            (_fit_ridge(points, values, weights, ridge) for ridge in RIDGES),
            key=lambda fit: float(np.sum((weights * (fit.left_out - values)) ** 2)),
        )
        self.ridge, self._coefficients, self._left_out = (
            best.ridge,
            best.coefficients,
            best.left_out,
        )
        # Ridge is the posterior mean under a normal prior (Bishop 2006, section 3.3).
        residuals = weights * (values - _features(points) @ self._coefficients)
        noise = residuals @ residuals / max(num_rows - best.leverage.sum(), 1.0)
        self._covariance = noise * best.inverse
        unsure = noise * best.leverage / (1 - best.leverage) / weights**2
        self._misfit = misfit(values - self._left_out, unsure + noise_variance(stderrs))

    def predict(self, points: Array) -> tuple[Array, Array]:
        """Return the posterior mean and the standard deviation of the noise-free score."""
        features = _features(points)
        variance = np.einsum("pf,fg,pg->p", features, self._covariance, features, optimize=True)
        return features @ self._coefficients, np.sqrt(np.maximum(variance, 0.0) + self._misfit**2)

    def sample(self, points: Array, num: int, rng: np.random.Generator) -> Array:
        """Return draws ``(num, P)``: of the coefficients, and of what a quadratic misses."""
        features = _features(points)
        covariance = features @ self._covariance @ features.T
        covariance += self._misfit**2 * missed_surface(points)
        return joint_draws(features @ self._coefficients, covariance, num, rng)

    def leave_one_out(self) -> Array:
        """Return for each fitted row ``(N,)`` its prediction from all others."""
        return self._left_out


class _Ridge(NamedTuple):
    """One ridge fit; ``inverse`` is of the penalised normal matrix, ``leverage`` per row."""

    ridge: float
    coefficients: Array
    left_out: Array
    leverage: Array
    inverse: Array


def _fit_ridge(points: Array, values: Array, weights: Array, ridge: float) -> _Ridge:
    features = _features(points)
    rows = weights[:, None] * features
    penalty = np.full(features.shape[1], ridge)
    # A touch on the linear part, so that a domain no point holds is not singular.
    penalty[: points.shape[1]] = 1e-10
    inverse = np.linalg.inv(rows.T @ rows + np.diag(penalty))
    coefficients = inverse @ (rows.T @ (weights * values))
    leverage = np.einsum("nf,fg,ng->n", rows, inverse, rows, optimize=True)
    leverage = np.clip(leverage, 0.0, 1 - 1e-10)
    left_out = values - (values - features @ coefficients) / (1 - leverage)
    return _Ridge(ridge, coefficients, left_out, leverage, inverse)


def _features(points: Array) -> Array:
    first, second = np.triu_indices(points.shape[1], k=1)
    return np.concatenate([points, points[:, first] * points[:, second]], axis=1)
