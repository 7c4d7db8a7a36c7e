"""What is highest of a prediction: the mean of the best, and an argmax that climbs."""

from __future__ import annotations

import numpy as np

from megatron_mergemix.mixtures.simplex import Bounds, dense_points, within
from megatron_mergemix.search.selection import refined_argmax, top_mean


def test_the_mean_of_the_best_is_of_those_of_highest_prediction() -> None:
    points = np.array([[1.0, 0.0], [0.8, 0.2], [0.5, 0.5], [0.2, 0.8], [0.0, 1.0]])
    predicted = np.array([0.1, 0.9, 0.3, 0.7, 0.2])
    np.testing.assert_allclose(top_mean(points, predicted, 2), [0.5, 0.5])
    np.testing.assert_allclose(top_mean(points, predicted, 1), [0.8, 0.2])
    np.testing.assert_allclose(top_mean(points, predicted, 3), [0.5, 0.5])


def test_the_argmax_climbs_from_the_dense_points_to_the_peak_within_the_bounds() -> None:
    bounds = Bounds(np.zeros(6), np.array([0.25, 1, 1, 1, 1, 1]))
    peak = np.array([0.4, 0.3, 0.1, 0.1, 0.05, 0.05])  # beyond the bound of the first share

    def utility(points: np.ndarray) -> np.ndarray:
        return np.asarray(-((points - peak) ** 2).sum(axis=1))

    points = dense_points(bounds, np.random.default_rng(0), 2000)
    found = refined_argmax(utility, points, utility(points), bounds, np.random.default_rng(1))
    best_inside = peak + np.array([-0.15, *[0.03] * 5])
    assert within(found[None], bounds).all()
    assert np.abs(found - best_inside).max() < 0.01
    assert utility(found[None])[0] > utility(points).max() + 1e-3
