"""Gaussian process on mixtures: Matern-5/2 with one length per domain, on top of a quadratic.

Covariance: ``signal^2 * matern(r) + linear^2 * x.x' + quadratic^2 * (x.x')^2 + noise``, where x
are the shares, or a power of them (``gp_root``). Standard errors shape the noise but do not fix
its size: all trials are scored on the same items, so most of a score's standard error is common to
all of them and does not blur their differences. The noise variance of trial i is therefore
``noise^2 * stderr_i^2`` with one learned factor ``noise``, hardly above 1. The lengths and the four
factors maximise the marginal likelihood times weak log-normal priors, which keep the fit sane at
20 points and 15 domains (Rasmussen and Williams 2006, sections 2.2, 5.4.1, 5.4.2).
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize
from scipy.spatial.distance import cdist

from megatron_mergemix.errors import SearchError
from megatron_mergemix.mixtures.simplex import Array
from megatron_mergemix.search.surrogates.draws import inflation, joint_draws
from megatron_mergemix.search.surrogates.noise import usable_errors

JITTER = 1e-8
"""Added to the variance of standardised scores, for a stable Cholesky factor."""

STARTS = (0.6, 1.6, 4.0)
"""Lengths from which the likelihood is climbed; the edge of the simplex is 1.41 long."""


class Prior(NamedTuple):
    """Normal distribution of the logarithm of a hyper-parameter, with two widths."""

    mode: float
    below: float
    above: float


LENGTH = Prior(0.5, 0.5, 0.5)
FACTOR = Prior(0.0, 2.0, 2.0)
"""Of the signal, the linear and the quadratic law, in spreads of the scores."""
KNOWN_NOISE = Prior(-0.2, 0.7, 0.2)
"""In standard errors. Merging and scoring are deterministic, so the choice of items is all the
noise there is: its factor is at most 1, and small when most of it is common to all trials."""
UNKNOWN_NOISE = Prior(-3.0, 1.5, 1.5)
"""In spreads of the scores."""


class GaussianProcess:
    """Exact GP regression with hyper-parameters by maximum a posteriori."""

    name: ClassVar[str] = "gp"
    power: ClassVar[float] = 1.0
    """Of the shares, before anything else is done with them."""

    @staticmethod
    def min_rows(num_domains: int) -> int:
        """Return one row per domain, and two more to see curvature and noise."""
        return num_domains + 2

    def fit(self, points: Array, values: Array, stderrs: Array | None = None) -> None:
        """See :class:`~megatron_mergemix.search.surrogates.surrogate.Surrogate`."""
        needed = self.min_rows(points.shape[1])
        if len(points) < needed:
            raise SearchError(
                f"The {self.name} surrogate needs at least {needed} measured "
                f"mixtures for {points.shape[1]} domains; got {len(points)}. Raise search.trials."
            )
        self._warped = self._warp(points)
        self._center, self._spread = values.mean(), values.std() or 1.0
        targets = (values - self._center) / self._spread
        shape, noise = _noise_shape(stderrs, len(points), self._spread)
        priors = np.array([LENGTH] * points.shape[1] + [FACTOR] * 3 + [noise], dtype=np.float64)
        self._theta = self._most_likely(targets, shape, priors)
        covariance = _kernel(self._warped, self._warped, self._theta)
        blur = np.exp(2 * self._theta[-1]) * shape
        covariance[np.diag_indices(len(points))] += blur + JITTER
        self._factor = cholesky(covariance, lower=True)
        inverse = cho_solve((self._factor, True), np.eye(len(points)))
        self._dual = inverse @ targets
        # Closed form of the posterior without row i (Rasmussen and Williams, eq. 5.12).
        residuals = self._dual / np.diag(inverse)
        self._left_out = values - self._spread * residuals
        self._inflation = inflation(residuals, 1 / np.diag(inverse) - blur, blur)

    def _most_likely(self, targets: Array, shape: Array, priors: Array) -> Array:
        """Return the hyper-parameters of the best of a few climbs."""
        squares = (self._warped[:, None, :] - self._warped[None, :, :]) ** 2
        gram = self._warped @ self._warped.T
        bounds = [(mode - 3 * below, mode + 3 * above) for mode, below, above in priors]
        climbs = [
            minimize(
                _cost,
                np.concatenate([np.full(squares.shape[2], np.log(start)), priors[-4:, 0]]),
                args=(squares, gram, targets, shape, priors),
                jac=True,
                method="L-BFGS-B",
                bounds=bounds,
                options={"maxiter": 100},
            )
            for start in STARTS
        ]
        return np.asarray(min(climbs, key=lambda climb: float(climb.fun)).x)

    def _warp(self, points: Array) -> Array:
        return np.asarray(np.maximum(points, 0.0) ** self.power)

    def _posterior(self, warped: Array) -> tuple[Array, Array]:
        """Return the mean ``(P,)``, and ``(N, P)`` whose squares are what the rows explain."""
        cross = _kernel(warped, self._warped, self._theta)
        reduced = solve_triangular(self._factor, cross.T, lower=True)
        return self._center + self._spread * (cross @ self._dual), reduced

    def predict(self, points: Array) -> tuple[Array, Array]:
        """Return the posterior mean and the standard deviation of the noise-free score."""
        warped = self._warp(points)
        mean, reduced = self._posterior(warped)
        signal, linear, quadratic = np.exp(2 * self._theta[-4:-1])
        norms = (warped**2).sum(axis=1)
        prior = signal + linear * norms + quadratic * norms**2
        variance = np.maximum(prior - (reduced**2).sum(axis=0), 0.0)
        return mean, self._inflation * self._spread * np.sqrt(variance)

    def sample(self, points: Array, num: int, rng: np.random.Generator) -> Array:
        """Return draws ``(num, P)`` from the joint posterior of the noise-free score."""
        warped = self._warp(points)
        mean, reduced = self._posterior(warped)
        covariance = _kernel(warped, warped, self._theta) - reduced.T @ reduced
        return joint_draws(mean, (self._inflation * self._spread) ** 2 * covariance, num, rng)

    def leave_one_out(self) -> Array:
        """Return for each fitted row ``(N,)`` its prediction from all others."""
        return self._left_out


def _noise_shape(stderrs: Array | None, num_rows: int, spread: float) -> tuple[Array, Prior]:
    """Return the relative noise variance per row and the prior of its factor."""
    errors = usable_errors(stderrs)
    if errors is None:
        return np.ones(num_rows), UNKNOWN_NOISE
    return (errors / spread) ** 2, KNOWN_NOISE


def _kernel(points: Array, others: Array, theta: Array) -> Array:
    """Return the noise-free covariance ``(P, Q)``.

    Theta holds logarithms: of the lengths, then of signal, linear, quadratic and noise factor.
    """
    lengths, (signal, linear, quadratic) = np.exp(theta[:-4]), np.exp(2 * theta[-4:-1])
    distance = np.sqrt(5) * cdist(points / lengths, others / lengths)
    matern = (1 + distance + distance**2 / 3) * np.exp(-distance)
    gram = points @ others.T
    return np.asarray(signal * matern + linear * gram + quadratic * gram**2)


def _cost(
    theta: Array, squares: Array, gram: Array, targets: Array, shape: Array, priors: Array
) -> tuple[float, Array]:
    """Return the negative log posterior of theta, up to a constant, and its gradient."""
    inverse_squares = np.exp(-2 * theta[:-4])
    distance = np.sqrt(5 * (squares @ inverse_squares))
    decay = np.exp(-distance)
    matern = (1 + distance + distance**2 / 3) * decay
    signal, linear, quadratic, noise = np.exp(2 * theta[-4:])
    parts = [signal * matern, linear * gram, quadratic * gram**2, np.diag(noise * shape)]
    factor = cholesky(sum(parts) + JITTER * np.eye(len(targets)), lower=True)
    inverse = cho_solve((factor, True), np.eye(len(targets)))
    dual = inverse @ targets
    widths = np.where(theta < priors[:, 0], priors[:, 1], priors[:, 2])
    standard = (theta - priors[:, 0]) / widths
    cost = 0.5 * targets @ dual + np.log(np.diag(factor)).sum() + 0.5 * (standard**2).sum()
    # d cost / d theta = 1/2 sum(sensitivity * d covariance / d theta)
    sensitivity = inverse - np.outer(dual, dual)
    slope = sensitivity * signal * (5 / 3) * (1 + distance) * decay
    gradient = np.concatenate(
        [
            0.5 * np.einsum("nm,nmd->d", slope, squares) * inverse_squares,
            [(sensitivity * part).sum() for part in parts],
        ]
    )
    return float(cost), gradient + standard / widths
