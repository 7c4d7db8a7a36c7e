"""Weighted means on a sphere, computed from inner products alone."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from megatron_mergemix.mixtures.simplex import Array

_STEPS = 100
_CONVERGED = 1e-14


def spherical_weights(products: ArrayLike, weights: ArrayLike) -> Array | None:
    """Return ``c`` such that ``sum_k c_k x_k`` is the weighted mean of the ``x_k`` on a sphere.

    The direction is the point with the least weighted sum of squared angles to the directions of
    the ``x_k``, for two of them ``slerp(x_0, x_1, w_1)``. The length is the weighted mean of
    their lengths.

    Args:
        products: ``[K, K]``, inner products of the ``x_k``.
        weights: ``[K]``, not negative, sum 1.

    Returns:
        ``[K]``; None where the mean is not defined: an ``x_k`` is zero, or they are opposite.

    Sources: Shoemake, Animating rotation with quaternion curves (SIGGRAPH 1985); Buss and
        Fillmore, Spherical averages (ACM TOG 2001), Algorithm A1.
    """
    gram, w = np.asarray(products, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    lengths = np.sqrt(np.diag(gram))
    if not np.all(lengths > 0) or not np.all(np.isfinite(gram)):
        return None
    cosines = gram / np.outer(lengths, lengths)
    mean = w.copy()  # coordinates in the unit vectors
    for _ in range(_STEPS):
        square = float(mean @ cosines @ mean)
        if square < 1e-12:
            return None
        mean /= math.sqrt(square)
        # The tangent at the mean towards each unit vector, as long as the angle.
        along = cosines @ mean
        identity = np.eye(len(w))
        across = identity - np.outer(along, mean)
        sines = np.sqrt(np.maximum(np.einsum("ki,ij,kj->k", across, cosines, across), 0.0))
        angles = np.arctan2(sines, along)
        factors = np.divide(angles, sines, out=np.ones_like(angles), where=sines > 1e-300)
        step = (w * factors) @ across
        length = math.sqrt(max(float(step @ cosines @ step), 0.0))
        if length < _CONVERGED:
            break
        mean = mean * math.cos(length) + step * (math.sin(length) / length)
    return mean * float(w @ lengths) / lengths
