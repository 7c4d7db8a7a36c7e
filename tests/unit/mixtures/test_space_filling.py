"""Mixtures that fill the space between others."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist, pdist

from megatron_mergemix.mixtures.levels import Levels
from megatron_mergemix.mixtures.simplex import (
    Bounds,
    corners,
    sample_uniform,
    whole_simplex,
    within,
)
from megatron_mergemix.mixtures.space_filling import farthest_points, filling_mixtures

LOW, HIGH = np.array([0.1, 0.0, 0.0, 0.0]), np.array([0.5, 0.6, 1.0, 0.3])
REGIONS = {
    "simplex": whole_simplex(4),
    "bounds": Bounds(LOW, HIGH),
    "floor": Bounds(np.zeros(4), np.ones(4), floor=0.2),
}


@pytest.mark.parametrize("region", REGIONS)
def test_they_are_distinct_mixtures_within_the_bounds(region: str) -> None:
    bounds = REGIONS[region]
    points = np.array(filling_mixtures(bounds, 24, seed=0))
    assert points.shape == (24, 4)
    assert within(points, bounds).all()
    assert pdist(points).min() > 0.03
    assert cdist(points, [*corners(bounds), np.full(4, 0.25)]).min() > 0.03


@pytest.mark.parametrize("num_domains", [3, 5, 8])
def test_they_are_farther_apart_than_random_ones(num_domains: int) -> None:
    bounds = whole_simplex(num_domains)
    least = pdist(filling_mixtures(bounds, 24, seed=0)).min()
    rng = np.random.default_rng(0)
    random = [pdist(sample_uniform(bounds, 24, rng)).min() for _ in range(200)]
    assert least > 1.5 * max(random)


def test_no_mixture_is_far_from_all_of_them() -> None:
    """Farthest-point choice leaves no hole that is larger than its least distance."""
    bounds = whole_simplex(3)
    points = filling_mixtures(bounds, 24, seed=0)
    anywhere = sample_uniform(bounds, 500, np.random.default_rng(1))
    taken = np.array([*points, *np.eye(3), np.full(3, 1 / 3)])
    assert cdist(anywhere, taken).min(axis=1).max() < 1.1 * pdist(points).min()


def test_the_seed_decides_and_more_begin_with_the_same() -> None:
    bounds = whole_simplex(5)
    few, many = filling_mixtures(bounds, 6, seed=3), filling_mixtures(bounds, 24, seed=3)
    np.testing.assert_array_equal(many[:6], few)
    assert not np.allclose(filling_mixtures(bounds, 6, seed=4), few)


def test_each_is_the_farthest_from_all_before() -> None:
    line = np.array([[0.0], [1.0], [0.45], [0.8], [0.25]])
    chosen = farthest_points(line, taken=np.array([[0.0]]), num=3)
    assert [float(point[0]) for point in chosen] == [1.0, 0.45, 0.25]


def test_where_there_is_no_room_there_are_fewer() -> None:
    point = Bounds(np.array([0.3, 0.7]), np.array([0.3, 0.7]))
    assert filling_mixtures(point, 3, seed=0) == []
    assert farthest_points(np.array([[0.0], [1.0]]), np.array([[0.0]]), 5) == [1.0]


@pytest.mark.parametrize("limits", [(0.0, 0.4), (0.7, 0.75), (0.3, 0.3)])
def test_filling_mixtures_are_within_the_bounds_of_groups(limits: tuple[float, float]) -> None:
    names = [f"domain{place}" for place in range(8)]
    levels = Levels({"a": names[:2], "b": names[2:]}, names, whole_simplex(8), {"a": limits})
    points = np.array(filling_mixtures(whole_simplex(8), 24, seed=0, levels=levels))
    assert len(points) == 24
    assert levels.hold(points).all()
    assert limits[0] - 1e-9 <= points[:, :2].sum(axis=1).min()
    assert points[:, :2].sum(axis=1).max() <= limits[1] + 1e-9
