"""Mixtures in groups: every point that a frame gives is a mixture within all bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from megatron_mergemix.errors import ConfigError
from megatron_mergemix.mixtures.levels import Between, Inside, Levels
from megatron_mergemix.mixtures.simplex import Bounds, dense_points, sample_uniform, whole_simplex

SIZES = (3, 1, 2)
DOMAINS = ("a0", "a1", "a2", "b", "c0", "c1")
GROUPS = {"a": DOMAINS[:3], "b": ("b",), "c": DOMAINS[4:]}
TOKENS = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) / 21


def levels_of(bounds: Bounds | None = None, **groups: tuple[float, float]) -> Levels:
    return Levels(GROUPS, DOMAINS, bounds or whole_simplex(6), groups)


@st.composite
def bounded(draw: st.DrawFn) -> Levels:
    """Draw groups and domains with bounds that some mixture satisfies."""
    share = st.floats(0, 1)
    low = np.array([0.16 * draw(share) for _ in DOMAINS])
    high = np.array([min(1.0, least + draw(share)) for least in low])
    limits = {name: (0.3 * draw(share), 0.3 + 0.7 * draw(share)) for name in ("a", "c")}
    try:
        return Levels(GROUPS, DOMAINS, Bounds(low, high), limits)
    except ConfigError:
        assume(False)
        raise


@settings(max_examples=60, deadline=None)
@given(levels=bounded(), seed=st.integers(0, 10**6))
def test_every_point_of_every_frame_is_within_all_bounds(levels: Levels, seed: int) -> None:
    rng = np.random.default_rng(seed)
    between = Between(levels, rng.dirichlet(np.ones(6)), TOKENS)
    for coordinates in sample_uniform(between.bounds, 5, rng):
        mixture = between.embed(coordinates)
        assert levels.hold(mixture)
        assert between.read(mixture) == pytest.approx(coordinates, abs=1e-9)
    for group in ("a", "c"):
        around = levels.alone(group, TOKENS)
        assert levels.hold(around)
        inside = Inside(levels, group, around, TOKENS)
        if inside.total < 0.01:
            continue
        for coordinates in sample_uniform(inside.bounds, 5, rng):
            mixture = inside.embed(coordinates)
            assert levels.hold(mixture)
            assert inside.read(mixture) == pytest.approx(coordinates, abs=1e-9)
            assert between.read(mixture) == pytest.approx(between.read(around), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(levels=bounded(), seed=st.integers(0, 10**6))
def test_projected_points_are_within_all_bounds_and_stay_where_they_are(
    levels: Levels, seed: int
) -> None:
    points = np.random.default_rng(seed).normal(0.2, 0.5, size=(8, 6))
    nearest = levels.project(points)
    assert levels.hold(nearest).all()
    assert (levels.project(nearest) == nearest).all()
    assert levels.hold(levels.corners()).all()


def test_the_projection_is_the_nearest_mixture() -> None:
    """Against a general solver, with bounds of groups and of domains that bind."""
    levels = levels_of(Bounds(np.full(6, 0.02), np.full(6, 0.4)), a=(0.1, 0.45), c=(0.3, 0.9))
    for point in np.random.default_rng(3).normal(0.2, 0.5, size=(6, 6)):
        totals = [
            {"type": "ineq", "fun": lambda x: 0.45 - x[:3].sum()},
            {"type": "ineq", "fun": lambda x: x[:3].sum() - 0.1},
            {"type": "ineq", "fun": lambda x: x[4:].sum() - 0.3},
            {"type": "eq", "fun": lambda x: x.sum() - 1},
        ]
        solved = minimize(
            lambda x, point=point: ((x - point) ** 2).sum(),
            levels.project(np.full(6, 1 / 6)),
            bounds=[(0.02, 0.4)] * 6,
            constraints=totals,
            options={"ftol": 1e-14, "maxiter": 500},
        )
        assert levels.project(point) == pytest.approx(solved.x, abs=1e-5)


def test_without_bounds_groups_are_scaled_and_corners_are_exactly_pure() -> None:
    levels = levels_of()
    mixture = levels.compose(np.array([0.5, 0.2, 0.3]), TOKENS)
    assert mixture == pytest.approx([0.5 / 6, 1 / 6, 0.25, 0.2, 0.3 * 5 / 11, 0.3 * 6 / 11])
    assert levels.corners().tolist() == np.eye(6).tolist()
    assert levels.alone("c", TOKENS)[:4].tolist() == [0, 0, 0, 0]
    assert levels.alone("c", TOKENS)[4:] == pytest.approx([5 / 11, 6 / 11])
    points = dense_points(whole_simplex(6), np.random.default_rng(0), 100)
    assert (levels.project(points) == points).all()


def test_a_domain_at_its_bound_leaves_the_rest_to_the_others_of_its_group() -> None:
    high = np.array([0.1, 1, 1, 1, 1, 1])
    mixture = levels_of(Bounds(np.zeros(6), high)).compose(
        np.array([0.6, 0.4, 0.0]), np.array([0.6, 0.2, 0.2, 1, 0.5, 0.5])
    )
    assert mixture == pytest.approx([0.1, 0.25, 0.25, 0.4, 0, 0])


def test_a_group_is_searched_where_its_domains_have_room() -> None:
    """All that its domains can give is 0.4, with one mixture inside; half of it leaves room."""
    high = np.array([0.1, 0.2, 0.1, 1, 1, 1])
    levels = levels_of(Bounds(np.zeros(6), high))
    inside = Inside(levels, "a", levels.alone("a", TOKENS), TOKENS)
    assert inside.total == pytest.approx(0.2)
    assert inside.freedom == pytest.approx(1.0)
    assert inside.bounds.high == pytest.approx([0.5, 1.0, 0.5])


def test_freedom_counts_what_the_other_domains_leave() -> None:
    high = np.array([1, 1, 1, 1, 0.2, 0.1])
    levels = levels_of(Bounds(np.zeros(6), high))
    around = levels.compose(np.array([0.7, 0.0, 0.3]), TOKENS)
    assert Inside(levels, "c", around, TOKENS).freedom == pytest.approx(0.0, abs=1e-9)


def test_gradients_follow_the_chain_rule() -> None:
    high = np.array([0.1, 1, 1, 1, 1, 1])
    levels = levels_of(Bounds(np.zeros(6), high))
    slope = np.array([3.0, -1.0, 2.0, 0.5, 4.0, -2.0])
    between = Between(levels, np.array([0.5, 0.25, 0.25, 1, 0.5, 0.5]), TOKENS)
    # Below a total of 0.2 the first domain has half of the group; beyond, its bound.
    free = between.pull_back(np.array([0.1, 0.3, 0.6]), slope)
    assert free == pytest.approx([0.5 * 3 - 0.25 + 0.5, 0.5, 1.0])
    at_bound = between.pull_back(np.array([0.6, 0.1, 0.3]), slope)
    assert at_bound == pytest.approx([-0.5 + 1.0, 0.5, 1.0])
    around = levels.compose(np.array([0.3, 0.3, 0.4]), TOKENS)
    inside = Inside(levels, "c", around, TOKENS)
    assert inside.pull_back(np.array([0.5, 0.5]), slope) == pytest.approx([1.6, -0.8])


def test_bounds_that_exclude_each_other_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"domains\.a: the least share of the group is 0\.6"):
        levels_of(Bounds(np.full(6, 0.0), np.full(6, 0.15)), a=(0.6, 1.0))
    with pytest.raises(ConfigError, match=r"largest shares that sum to 0\.9; no mixture"):
        levels_of(Bounds(np.zeros(6), np.full(6, 0.4)), a=(0.0, 0.2), c=(0.0, 0.3))
