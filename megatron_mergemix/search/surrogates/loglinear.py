"""The log-linear law of data mixing: a score falls short of its limit by ``exp(b + x.t)``.

``y = c - exp(x.t)``, where t holds b, as shares sum to 1: the law that data mixing laws (arXiv
2403.16952) and Olmix (allenai/olmix) fit to losses, ``loss = c + exp(b + x.t)``, for scores of
which higher is better. Least squares in c and t, weighted by the standard errors, with a ridge on
how much the t differ between domains; its strength is the one of the least leave-one-out error.
A limit far away makes the law linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares

from megatron_mergemix.errors import SearchError
from megatron_mergemix.mixtures.simplex import Array
from megatron_mergemix.search.surrogates.draws import joint_draws, misfit, missed_surface
from megatron_mergemix.search.surrogates.noise import noise_variance, row_weights

RIDGES = np.logspace(1, -4, 6)
"""Strengths that are tried, for standardised scores; from strong to weak."""

GAPS = (0.3, 1.0, 4.0)
"""From the best score to the limit, in spreads of the scores: where the fit starts."""

GAP_PRIOR = (1.0, 2.0)
"""Mean and standard deviation of the logarithm of that gap. Scores of a straight line do not say
where the limit is, and it would run away with all of t."""

PRIOR_WEIGHT = 0.05
"""Of a deviation from that prior, against a miss of one row by one spread of the scores."""


class LogLinear:
    """Regularised least squares on the law, from several starts."""

    @staticmethod
    def min_rows(num_domains: int) -> int:
        """Return two rows per coefficient: with 1.5 the law explodes at 15 domains."""
        return 2 * (num_domains + 1)

    def fit(self, points: Array, values: Array, stderrs: Array | None = None) -> None:
        """See :class:`~megatron_mergemix.search.surrogates.surrogate.Surrogate`."""
        num_rows, num_domains = points.shape
        if num_rows < self.min_rows(num_domains):
            raise SearchError(
                f"The loglinear surrogate needs at least {self.min_rows(num_domains)} measured "
                f"mixtures for {num_domains} domains (2 per coefficient); got {num_rows}. Raise "
                "search.trials, or use search.surrogate: gp."
            )
        self._center, self._spread = values.mean(), values.std() or 1.0
        targets = (values - self._center) / self._spread
        weights = row_weights(stderrs, num_rows)
        self._top = float(np.max(targets))
        fits: list[_Fit] = []
        for ridge in RIDGES:
            starts = _starts(points, targets, self._top) if not fits else [fits[-1].theta]
            fits.append(self._fit_ridge(points, targets, weights, ridge, starts))
        best = min(fits, key=lambda fit: float(np.sum((weights * (fit.left_out - targets)) ** 2)))
        self._theta, self.ridge = best.theta, best.ridge
        self._left_out = self._center + self._spread * best.left_out
        # Laplace's approximation of the posterior (Bishop 2006, section 4.4).
        residuals = weights * (targets - _law(points, best.theta, self._top))
        noise = residuals @ residuals / max(num_rows - best.leverage.sum(), 1.0)
        noise *= self._spread**2
        self._covariance = noise * best.inverse
        unsure = noise * best.leverage / (1 - best.leverage) / weights**2
        self._misfit = misfit(values - self._left_out, unsure + noise_variance(stderrs))

    def _fit_ridge(
        self, points: Array, targets: Array, weights: Array, ridge: float, starts: Sequence[Array]
    ) -> _Fit:
        arguments = (points, targets, weights, ridge, self._top)
        fits = [
            least_squares(_residuals, start, _jacobian, method="lm", args=arguments, max_nfev=200)
            for start in starts
        ]
        theta = min(fits, key=lambda fit: float(fit.cost)).x
        jacobian = _jacobian(theta, *arguments)
        inverse = np.linalg.inv(jacobian.T @ jacobian + 1e-12 * np.eye(len(theta)))
        rows = jacobian[: len(points)]
        leverage = np.einsum("nf,fg,ng->n", rows, inverse, rows, optimize=True)
        leverage = np.clip(leverage, 0.0, 1 - 1e-10)
        gaps = targets - _law(points, theta, self._top)
        return _Fit(ridge, theta, targets - gaps / (1 - leverage), leverage, inverse)

    def predict(self, points: Array) -> tuple[Array, Array]:
        """Return the law and the standard deviation of the noise-free score."""
        slopes = _slopes(points, self._theta)
        variance = np.einsum("pf,fg,pg->p", slopes, self._covariance, slopes, optimize=True)
        return self._mean(points), np.sqrt(np.maximum(variance, 0.0) + self._misfit**2)

    def sample(self, points: Array, num: int, rng: np.random.Generator) -> Array:
        """Return draws ``(num, P)``: of the coefficients, to first order, and of the misfit."""
        slopes = _slopes(points, self._theta)
        covariance = slopes @ self._covariance @ slopes.T
        covariance += self._misfit**2 * missed_surface(points)
        return joint_draws(self._mean(points), covariance, num, rng)

    def leave_one_out(self) -> Array:
        """Return the predictions ``(N,)`` of one Gauss-Newton step away from each row."""
        return self._left_out

    def _mean(self, points: Array) -> Array:
        return np.asarray(self._center + self._spread * _law(points, self._theta, self._top))


class _Fit(NamedTuple):
    """One fit; ``inverse`` is of the penalised normal matrix, ``leverage`` per row."""

    ridge: float
    theta: Array
    left_out: Array
    leverage: Array
    inverse: Array


def _starts(points: Array, targets: Array, top: float) -> list[Array]:
    """Return for some limits the law whose logarithm is fitted to the scores."""
    starts = []
    normal = points.T @ points + 0.01 * len(points) * np.eye(points.shape[1])
    for gap in GAPS:
        logs = np.log(top + gap - targets)
        slopes = logs.mean() + np.linalg.solve(normal, points.T @ (logs - logs.mean()))
        starts.append(np.concatenate([[np.log(gap)], slopes]))
    return starts


def _law(points: Array, theta: Array, top: float) -> Array:
    """Return the scores; theta: logarithm of the limit minus ``top``, then t."""
    return np.asarray(top + np.exp(_tame(theta[0])) - np.exp(_tame(points @ theta[1:])))


def _slopes(points: Array, theta: Array) -> Array:
    """Return the derivative of the law ``(P, 1 + D)``."""
    fall = np.exp(_tame(points @ theta[1:]))
    limit = np.full((len(points), 1), np.exp(_tame(theta[0])))
    return np.concatenate([limit, -fall[:, None] * points], axis=1)


def _tame(exponent: Array) -> Array:
    """Return the exponent, kept from overflow where a climb strays."""
    return np.minimum(exponent, 30.0)


def _residuals(
    theta: Array, points: Array, targets: Array, weights: Array, ridge: float, top: float
) -> Array:
    slopes = theta[1:]
    mean, spread = GAP_PRIOR
    return np.concatenate(
        [
            weights * (_law(points, theta, top) - targets),
            np.sqrt(ridge) * (slopes - slopes.mean()),
            [PRIOR_WEIGHT * (theta[0] - mean) / spread],
        ]
    )


def _jacobian(
    theta: Array, points: Array, targets: Array, weights: Array, ridge: float, top: float
) -> Array:
    num_domains = len(theta) - 1
    contrast = np.zeros((num_domains, 1 + num_domains))
    contrast[:, 1:] = np.sqrt(ridge) * (np.eye(num_domains) - 1 / num_domains)
    prior = np.zeros((1, 1 + num_domains))
    prior[0, 0] = PRIOR_WEIGHT / GAP_PRIOR[1]
    return np.concatenate([weights[:, None] * _slopes(points, theta), contrast, prior])
