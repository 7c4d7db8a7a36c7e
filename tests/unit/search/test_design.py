from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_mergemix.errors import ConfigError
from megatron_mergemix.mixtures.simplex import (
    Bounds,
    corners,
    lattice,
    uniform,
    whole_simplex,
    within,
)
from megatron_mergemix.search.design import design
from tests.unit.mixtures.test_simplex import feasible_bounds

TOKENS = np.array([0.4, 0.3, 0.2, 0.1])


def purposes(points):
    return [purpose for purpose, _ in points]


def test_four_domains_and_forty_trials_are_the_lattice_of_quarters_and_five_more():
    points = design(whole_simplex(4), TOKENS, 40, seed=0)
    assert purposes(points) == (
        ["vertex"] * 4 + ["prior:uniform", "prior:proportional"] + ["lattice"] * 30 + ["fill"] * 4
    )
    assert np.array_equal([point for _, point in points[:4]], np.eye(4))
    assert np.array_equal(points[4][1], uniform(4))
    assert np.array_equal(points[5][1], TOKENS)
    asked = {tuple(point) for _, point in points}
    assert {tuple(point) for point in lattice(4, 4)} <= asked


@pytest.mark.parametrize(("domains", "num", "steps"), [(3, 24, 5), (5, 24, 2), (7, 40, 2)])
def test_the_finest_lattice_that_fits_is_taken(domains, num, steps):
    points = design(whole_simplex(domains), np.arange(1, domains + 1) / 28, num, seed=0)
    asked = {tuple(np.round(point, 12)) for _, point in points}
    assert {tuple(np.round(point, 12)) for point in lattice(domains, steps)} <= asked
    assert not {tuple(np.round(p, 12)) for p in lattice(domains, steps + 1)} <= asked


def test_many_domains_get_their_vertices_priors_and_spread_points():
    points = design(whole_simplex(15), uniform(15), 40, seed=0)
    assert purposes(points) == ["vertex"] * 15 + ["prior:uniform"] + ["fill"] * 24


def test_filling_points_keep_their_distance():
    points = np.array([point for _, point in design(whole_simplex(4), TOKENS, 40, seed=0)])
    distance = np.linalg.norm(points[:, None] - points[None], axis=2) + np.eye(40)
    assert distance[36:].min() > 0.12  # the lattice has 0.35 between neighbours


@settings(max_examples=30, deadline=None)
@given(feasible_bounds(max_domains=5), st.integers(10, 40), st.integers(0, 100))
def test_a_design_has_exactly_the_trials_within_the_bounds_and_no_duplicate(bounds, num, seed):
    assume(np.ptp(corners(bounds), axis=0).max() > 0.01)  # else there is no room for them
    points = design(bounds, uniform(len(bounds.low)), num, seed)
    vectors = np.array([point for _, point in points])
    assert len(points) == num
    assert within(vectors, bounds).all()
    gaps = np.abs(vectors[:, None] - vectors[None]).max(axis=2) + np.eye(num)
    assert gaps.min() > 1e-9
    again = design(bounds, uniform(len(bounds.low)), num, seed)
    assert np.array_equal(vectors, [point for _, point in again])


def test_bounds_move_the_vertices_to_what_they_allow():
    bounds = Bounds(np.array([0.0, 0.0, 0.4]), np.array([0.3, 1.0, 1.0]))
    points = design(bounds, uniform(3), 20, seed=0)
    vertices = [point for purpose, point in points if purpose == "vertex"]
    assert np.allclose(vertices, [[0.0, 0.6, 0.4], [0.0, 0.0, 1.0]])
    nearest_to_the_first = dict(points)["prior:uniform"]
    assert np.allclose(nearest_to_the_first, [0.3, 0.3, 0.4])


def test_what_bounds_leave_of_a_barred_domain_is_no_vertex_of_it():
    barred = Bounds(np.zeros(3), np.array([1.0, 1.0, 0.0]))
    points = design(barred, uniform(3), 8, seed=0)
    assert purposes(points)[:3] == ["vertex", "vertex", "prior:uniform"], "at its place"
    assert np.allclose(points[2][1], [0.5, 0.5, 0.0])
    held_up = Bounds(np.array([0.5, 0.0, 0.0, 0.0]), np.array([1.0, 1.0, 1.0, 0.3]))
    points = design(held_up, TOKENS, 12, seed=0)
    assert purposes(points)[:4] == ["vertex"] * 3 + ["corner"]
    assert purposes(points)[4:6] == ["prior:uniform", "prior:proportional"]
    assert np.allclose(points[3][1], [0.5, 0.1, 0.1, 0.3])


def test_where_bounds_leave_no_domain_alone_the_nearest_mixtures_are_the_vertices():
    narrow = Bounds(np.zeros(4), np.array([0.26, 0.26, 0.26, 0.26]))
    assert purposes(design(narrow, uniform(4), 7, seed=0))[:4] == ["vertex"] * 4


def test_another_seed_changes_the_filling_points_alone():
    first = design(whole_simplex(4), TOKENS, 40, seed=0)
    second = design(whole_simplex(4), TOKENS, 40, seed=1)
    same = [np.array_equal(a, b) for (_, a), (_, b) in zip(first, second, strict=True)]
    assert same == [True] * 36 + [False] * 4


def test_too_few_trials_for_vertices_and_priors_are_refused():
    assert len(design(whole_simplex(4), TOKENS, 6, seed=0)) == 6
    with pytest.raises(ConfigError, match=r"search\.trials is 5; expected at least 6"):
        design(whole_simplex(4), TOKENS, 5, seed=0)


def test_bounds_that_leave_one_mixture_are_refused():
    only = np.array([0.2, 0.3, 0.5])
    with pytest.raises(ConfigError, match="leave room for 1 distinct mixtures.* asks for 10"):
        design(Bounds(only, only), uniform(3), 10, seed=0)
