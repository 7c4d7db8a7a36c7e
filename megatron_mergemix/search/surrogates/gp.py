"""Gaussian process on mixtures: Matern-5/2 with one length per domain, on top of a linear law.

Covariance: ``signal^2 * matern(r) + linear^2 * x.x' + noise``. Standard errors shape the noise
but do not fix its size: all trials are scored on the same items, so most of a score's standard
error is common to all of them and does not blur their differences. The noise variance of trial
i is therefore ``noise^2 * stderr_i^2`` with one learned factor ``noise``. The lengths and the
three factors maximise the marginal likelihood times weak log-normal priors, which keep the fit
sane at 20 points and 15 domains (Rasmussen and Williams 2006, sections 2.2, 5.4.1, 5.4.2).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize
from scipy.spatial.distance import cdist

from megatron_mergemix.errors import SearchError

Array = NDArray[np.float64]

JITTER = 1e-8
"""Added to the variance of standardised scores, for a stable Cholesky factor."""

STARTS = (0.4, 1.0, 2.5)
"""Lengths from which the likelihood is climbed; the edge of the simplex is 1.41 long."""

LENGTH_PRIOR = (0.0, 1.0)
FACTOR_PRIOR = (0.0, 2.0)
KNOWN_NOISE_PRIOR = (-1.0, 1.5)
UNKNOWN_NOISE_PRIOR = (-3.0, 1.5)
"""Mean and standard deviation of the logarithms of the lengths, of the signal and linear factor,
and of the noise: in standard errors where they are known, else in spreads of the scores."""


class GaussianProcess:
    """Exact GP regression with hyper-parameters by maximum a posteriori."""

    @staticmethod
    def min_rows(num_domains: int) -> int:
        """Return one row per domain, and two more to see curvature and noise."""
        return num_domains + 2

    def fit(self, points: Array, values: Array, stderrs: Array | None = None) -> None:
        """See :class:`~megatron_mergemix.search.surrogates.surrogate.Surrogate`."""
        if len(points) < self.min_rows(points.shape[1]):
            raise SearchError(
                f"The gp surrogate needs at least {self.min_rows(points.shape[1])} measured "
                f"mixtures for {points.shape[1]} domains; got {len(points)}. Raise search.trials."
            )
        self._points = points
        self._center, self._spread = values.mean(), values.std() or 1.0
        targets = (values - self._center) / self._spread
        shape, noise_prior = _noise_shape(stderrs, len(points), self._spread)
        priors = np.array(
            [LENGTH_PRIOR] * points.shape[1] + [FACTOR_PRIOR] * 2 + [noise_prior], dtype=np.float64
        )
        self._theta = self._most_likely(targets, shape, priors)
        covariance = _kernel(points, points, self._theta)
        covariance[np.diag_indices(len(points))] += np.exp(2 * self._theta[-1]) * shape + JITTER
        self._factor = cholesky(covariance, lower=True)
        inverse = cho_solve((self._factor, True), np.eye(len(points)))
        self._dual = inverse @ targets
        # Closed form of the posterior without row i (Rasmussen and Williams, eq. 5.12).
        self._left_out = values - self._spread * self._dual / np.diag(inverse)

    def _most_likely(self, targets: Array, shape: Array, priors: Array) -> Array:
        """Return the hyper-parameters of the best of a few climbs."""
        squares = (self._points[:, None, :] - self._points[None, :, :]) ** 2
        gram = self._points @ self._points.T
        climbs = [
            minimize(
                _cost,
                np.concatenate([np.full(squares.shape[2], np.log(start)), priors[-3:, 0]]),
                args=(squares, gram, targets, shape, priors),
                jac=True,
                method="L-BFGS-B",
                bounds=[(mean - 3 * spread, mean + 3 * spread) for mean, spread in priors],
                options={"maxiter": 100},
            )
            for start in STARTS
        ]
        return np.asarray(min(climbs, key=lambda climb: float(climb.fun)).x)

    def predict(self, points: Array) -> tuple[Array, Array]:
        """Return the posterior mean and the standard deviation of the noise-free score."""
        cross = _kernel(points, self._points, self._theta)
        reduced = solve_triangular(self._factor, cross.T, lower=True)
        prior = np.exp(2 * self._theta[-3]) + np.exp(2 * self._theta[-2]) * (points**2).sum(axis=1)
        variance = np.maximum(prior - (reduced**2).sum(axis=0), 0.0)
        return self._center + self._spread * (cross @ self._dual), self._spread * np.sqrt(variance)

    def leave_one_out(self) -> Array:
        """Return for each fitted row ``(N,)`` its prediction from all others."""
        return self._left_out


def _noise_shape(
    stderrs: Array | None, num_rows: int, spread: float
) -> tuple[Array, tuple[float, float]]:
    """Return the relative noise variance per row and the prior of its factor.

    A standard error far below the others (an accuracy of exactly 0 or 1 has none) is lifted to
    a quarter of their median, so that no trial is taken for exact.
    """
    if stderrs is None or not np.isfinite(stderrs).all() or np.median(stderrs) <= 0:
        return np.ones(num_rows), UNKNOWN_NOISE_PRIOR
    lifted = np.maximum(stderrs, np.median(stderrs) / 4)
    return (lifted / spread) ** 2, KNOWN_NOISE_PRIOR


def _kernel(points: Array, others: Array, theta: Array) -> Array:
    """Return the noise-free covariance ``(P, Q)``; theta: log length, signal, linear, noise."""
    lengths, signal, linear = np.exp(theta[:-3]), np.exp(2 * theta[-3]), np.exp(2 * theta[-2])
    distance = np.sqrt(5) * cdist(points / lengths, others / lengths)
    matern = (1 + distance + distance**2 / 3) * np.exp(-distance)
    return np.asarray(signal * matern + linear * (points @ others.T))


def _cost(
    theta: Array, squares: Array, gram: Array, targets: Array, shape: Array, priors: Array
) -> tuple[float, Array]:
    """Return the negative log posterior of theta, up to a constant, and its gradient."""
    inverse_squares, signal, linear, noise = (
        np.exp(-2 * theta[:-3]),
        *np.exp(2 * theta[-3:]),
    )
    distance = np.sqrt(5 * (squares @ inverse_squares))
    decay = np.exp(-distance)
    matern = (1 + distance + distance**2 / 3) * decay
    covariance = signal * matern + linear * gram + np.diag(noise * shape + JITTER)
    factor = cholesky(covariance, lower=True)
    inverse = cho_solve((factor, True), np.eye(len(targets)))
    dual = inverse @ targets
    standard = (theta - priors[:, 0]) / priors[:, 1]
    cost = 0.5 * targets @ dual + np.log(np.diag(factor)).sum() + 0.5 * (standard**2).sum()
    # d cost / d theta = 1/2 sum(sensitivity * d covariance / d theta)
    sensitivity = inverse - np.outer(dual, dual)
    slope = sensitivity * signal * (5 / 3) * (1 + distance) * decay
    gradient = np.concatenate(
        [
            0.5 * np.einsum("nm,nmd->d", slope, squares) * inverse_squares,
            [
                (sensitivity * signal * matern).sum(),
                (sensitivity * linear * gram).sum(),
                (np.diag(sensitivity) * noise * shape).sum(),
            ],
        ]
    )
    return float(cost), gradient + standard / priors[:, 1]
