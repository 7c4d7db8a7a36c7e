"""Joint draws from a fitted surrogate, and how far its own uncertainty is to be believed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.spatial.distance import cdist

from megatron_mergemix.mixtures.simplex import Array

JITTER = 1e-10
"""Share of the largest variance that is added to all, so that repeated points have a factor."""


def joint_draws(mean: Array, covariance: Array, num: int, rng: np.random.Generator) -> Array:
    """Return draws ``(num, P)`` from a normal distribution whose covariance may be singular.

    Unlike an eigendecomposition, whose vectors turn freely where eigenvalues are equal, the
    Cholesky factor moves little when the covariance does, so another machine draws the same.
    """
    noise = rng.normal(size=(num, len(mean)))
    top = float(np.max(np.diag(covariance), initial=0.0))
    if top <= 0:
        return np.broadcast_to(mean, noise.shape).copy()
    for jitter in JITTER * top * 10.0 ** np.arange(8):
        try:
            factor = np.linalg.cholesky(covariance + jitter * np.eye(len(mean)))
        except np.linalg.LinAlgError:
            continue  # rounding has left a negative eigenvalue
        return mean + noise @ factor.T
    raise np.linalg.LinAlgError("the covariance of a surrogate is not positive semidefinite")


MOST_INFLATION = 3.0
"""Where noise hides nearly all of the surrogate's errors, chance alone could ask for any factor."""


def inflation(residuals: Array, variances: Array, noise: Array) -> float:
    """Return by how much the surrogate's standard deviations must grow to explain its errors.

    Hyper-parameters are fitted to the same rows, so a posterior rather claims too much than too
    little; where it claims too little nothing is changed.

    Args:
        residuals: score minus leave-one-out prediction ``(N,)``.
        variances: of the prediction, as the surrogate claims ``(N,)``.
        noise: variance of the score's noise ``(N,)``.

    Returns:
        The least factor of at least 1 with which the standardised residuals have mean square 1.
    """

    def fits(factor: float) -> bool:
        total = np.maximum(factor**2 * variances + noise, 1e-300)
        return bool(np.mean(residuals**2 / total) <= 1)

    return _least(fits, 1.0, MOST_INFLATION)


def _least(fits: Callable[[float], bool], low: float, high: float) -> float:
    """Return the least number that fits, or ``high``; a larger one fits whenever a smaller does."""
    if fits(low):
        return low
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


MISFIT_LENGTH = 0.4
"""How far what a law misses reaches on the simplex, whose edge is 1.41 long."""


def misfit(residuals: Array, variances: Array) -> float:
    """Return the standard deviation of the surface that a law of fixed form must have missed.

    A law does not doubt its form: with enough rows its coefficients are certain, however wrong
    it is. What the leave-one-out residuals hold beyond coefficients and noise is its form.

    Args:
        residuals: score minus leave-one-out prediction ``(N,)``.
        variances: of the prediction and of the score's noise together ``(N,)``.
    """

    # A plain difference of means would be lost among the few rows without which a coefficient is
    # unknown, so the standardised residuals are given mean square 1.
    def fits(size: float) -> bool:
        return bool(np.mean(residuals**2 / np.maximum(variances + size**2, 1e-300)) <= 1)

    return _least(fits, 0.0, float(np.abs(residuals).max(initial=0.0)))


def missed_surface(points: Array) -> Array:
    """Return the covariance ``(P, P)`` of a smooth surface of variance 1."""
    return np.asarray(np.exp(-0.5 * cdist(points, points, "sqeuclidean") / MISFIT_LENGTH**2))
