from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import minimize

from megatron_mergemix import config
from megatron_mergemix.errors import ConfigError
from megatron_mergemix.mixtures import projection, simplex
from megatron_mergemix.mixtures.simplex import Bounds

DOMAINS = ["math", "code", "web"]


@st.composite
def feasible_bounds(draw, max_domains=6):
    """Bounds around a mixture, so that at least that one lies within them."""
    num = draw(st.integers(2, max_domains))
    inside = draw(hnp.arrays(np.float64, num, elements=st.floats(0.01, 1))) + 1e-3
    inside /= inside.sum()
    below = draw(hnp.arrays(np.float64, num, elements=st.floats(0, 1)))
    above = draw(hnp.arrays(np.float64, num, elements=st.floats(0, 1)))
    return Bounds(inside * below, inside + (1 - inside) * above)


# ---- mixtures by name ----


def test_a_mixture_keeps_its_bits_through_vector_and_back():
    mixture = {"math": 0.1, "code": 0.7, "web": 0.2}
    assert simplex.to_mixture(simplex.to_vector(mixture, DOMAINS), DOMAINS) == mixture


def test_a_domain_left_out_has_no_share():
    assert simplex.to_vector({"code": 1.0}, DOMAINS).tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"mth": 1.0}, r"blend\.start: 'mth' is not a domain\. Did you mean 'math'\?"),
        ({"math": 0.5, "code": 0.47}, r"blend\.start: the shares sum to 0\.97; expected 1"),
        ({"math": 1.5, "code": -0.5}, r"blend\.start\.code is -0\.5"),
        ({"math": float("nan")}, r"blend\.start\.math is nan"),
    ],
)
def test_a_wrong_mixture_is_refused_with_its_place(mixture, message):
    with pytest.raises(ConfigError, match=message):
        simplex.to_vector(mixture, DOMAINS, "blend.start")


def test_named_mixtures():
    tokens = {"math": 10, "code": 30, "web": 60}
    proportional = simplex.named_mixture("proportional", DOMAINS, tokens)
    assert proportional.tolist() == [0.1, 0.3, 0.6]
    assert simplex.named_mixture("uniform", DOMAINS, tokens).tolist() == [1 / 3] * 3
    assert simplex.named_mixture({"web": 1.0}, DOMAINS, tokens).tolist() == [0, 0, 1]
    with pytest.raises(ConfigError, match="'learned'; expected uniform, proportional"):
        simplex.named_mixture("learned", DOMAINS, tokens)


# ---- bounds ----


def _domains(**bounds):
    return {
        name: config.Domain(prefixes=["x"], bounds=pair[:2], max_epochs=(pair + (None,))[2])
        for name, pair in bounds.items()
    }


def test_max_epochs_lowers_the_largest_share():
    domains = _domains(math=(0.0, 1.0, 4.0), web=(0.1, 0.9))
    bounds = simplex.mixture_bounds(domains, {"math": 5, "web": 1000}, train_tokens=100)
    assert bounds.low.tolist() == [0.0, 0.1]
    assert bounds.high.tolist() == [0.2, 0.9]
    assert simplex.mixture_bounds(domains, {"math": 5, "web": 1000}).high.tolist() == [1.0, 0.9]


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        (_domains(a=(0.6, 1.0), b=(0.5, 1.0)), "least shares of the domains sum to 1.1"),
        (_domains(a=(0.0, 0.3), b=(0.0, 0.4)), "largest shares of the domains sum to 0.7"),
        (_domains(a=(0.5, 0.2), b=(0.0, 1.0)), r"domains\.a: the least share is 0\.5"),
        (_domains(a=(0.5, 1.0, 1.0), b=(0.0, 1.0)), r"domains\.a: the least share is 0\.5 .* 0\.1"),
    ],
)
def test_bounds_that_no_mixture_satisfies_are_refused_with_their_numbers(domains, message):
    with pytest.raises(ConfigError, match=message):
        simplex.mixture_bounds(domains, {"a": 10, "b": 1000}, train_tokens=100)


@settings(max_examples=60, deadline=None)
@given(feasible_bounds(), st.data())
def test_projection_is_the_nearest_mixture_within_the_bounds(bounds, data):
    point = data.draw(hnp.arrays(np.float64, len(bounds.low), elements=st.floats(-3, 3)))
    projected = simplex.project(point, bounds)
    assert simplex.within(projected, bounds)
    # Optimality: no feasible direction from the projection leads nearer to the point.
    rng = np.random.default_rng(0)
    others = simplex.sample_uniform(bounds, 50, rng)
    assert ((others - projected) @ (point - projected)).max() <= 1e-8


def test_projection_agrees_with_a_general_solver():
    bounds = Bounds(np.array([0, 0.1, 0, 0]), np.array([0.5, 0.3, 1, 0.6]))
    for point in np.random.default_rng(0).normal(size=(8, 4)):
        oracle = minimize(
            lambda y, x=point: ((y - x) ** 2).sum(),
            np.array([0.25, 0.2, 0.3, 0.25]),
            bounds=list(zip(bounds.low, bounds.high, strict=True)),
            constraints={"type": "eq", "fun": lambda y: y.sum() - 1},
            method="SLSQP",
            options={"ftol": 1e-14},
        )
        assert np.abs(oracle.x - simplex.project(point, bounds)).max() < 1e-6


@st.composite
def floored_bounds(draw, max_domains=6):
    """Bounds with a floor that leave room for a mixture."""
    bounds = draw(feasible_bounds(max_domains))
    floor = draw(st.floats(0.001, 0.5))
    assume(projection.has_room(bounds.low, bounds.high, floor))
    return bounds._replace(floor=floor)


def _all_supports(points, bounds):
    """Return the nearest allowed mixture of each point, by trying every set of domains."""
    nearest, least = np.zeros_like(points), np.full(len(points), np.inf)
    for chosen in itertools.product([False, True], repeat=len(bounds.low)):
        low = np.where(chosen, np.maximum(bounds.low, bounds.floor), 0)
        high = np.where(chosen, bounds.high, 0)
        empty = (bounds.low > high).any() or (low > high).any()
        if empty or low.sum() > 1 + 1e-9 or high.sum() < 1 - 1e-9:
            continue
        for row, mixture in enumerate(simplex.project(points, Bounds(low, high))):
            distance = ((mixture - points[row]) ** 2).sum()
            if distance < least[row]:
                nearest[row], least[row] = mixture, distance
    return nearest, least


@settings(max_examples=60, deadline=None)
@given(floored_bounds(max_domains=5), st.integers(0, 1000))
def test_no_projected_share_lies_between_0_and_the_floor(bounds, seed):
    points = np.random.default_rng(seed).normal(0.2, 0.4, size=(30, len(bounds.low)))
    projected = simplex.project(points, bounds)
    assert np.abs(projected.sum(axis=1) - 1).max() < 1e-9
    assert (projected >= bounds.low - 1e-9).all()
    assert (projected <= bounds.high + 1e-9).all()
    assert ((projected == 0) | (projected >= bounds.floor - 1e-9)).all()
    assert np.array_equal(simplex.project(projected, bounds), projected)
    assert simplex.within(projected, bounds).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.floats(0.01, 0.5), st.floats(0.5, 1.0), st.integers(0, 1000))
def test_with_the_same_bounds_the_nearest_mixture_above_the_floor_is_found(num, floor, high, seed):
    bounds = Bounds(np.zeros(num), np.full(num, high), floor)
    points = np.random.default_rng(seed).normal(0.2, 0.4, size=(20, num))
    distance = ((simplex.project(points, bounds) - points) ** 2).sum(axis=1)
    assert np.allclose(distance, _all_supports(points, bounds)[1])


@settings(max_examples=100, deadline=None)
@given(feasible_bounds(max_domains=5), st.floats(0.0, 0.6))
def test_a_floor_that_no_mixture_reaches_is_recognised(bounds, floor):
    bounds = bounds._replace(floor=floor)
    points = np.zeros((1, len(bounds.low)))
    assert projection.has_room(*bounds) == np.isfinite(_all_supports(points, bounds)[1][0])


def test_a_floor_that_no_mixture_reaches_is_refused_with_its_number():
    domains = _domains(a=(0.0, 0.4), b=(0.3, 0.4), c=(0.0, 0.4))
    tokens = {"a": 1, "b": 1, "c": 1}
    assert simplex.mixture_bounds(domains, tokens, floor=0.33).floor == 0.33
    with pytest.raises(ConfigError, match=r"at 0 or above search\.min_share, 0\.35"):
        simplex.mixture_bounds(domains, tokens, floor=0.35)


@settings(max_examples=20, deadline=None)
@given(floored_bounds(max_domains=4))
def test_all_point_sets_respect_the_floor(bounds):
    rng = np.random.default_rng(0)
    for points in (
        simplex.corners(bounds),
        simplex.bounded_lattice(bounds, 7),
        simplex.sample_uniform(bounds, 100, rng),
        simplex.dense_points(bounds, rng, num=300),
    ):
        assert simplex.within(points, bounds).all()
        assert not ((points > 1e-9) & (points < bounds.floor - 1e-9)).any()


@settings(max_examples=40, deadline=None)
@given(feasible_bounds())
def test_projection_leaves_mixtures_within_the_bounds_bit_for_bit(bounds):
    inside = simplex.sample_uniform(bounds, 20, np.random.default_rng(1))
    assert np.array_equal(simplex.project(inside, bounds), inside)


def test_corners_of_the_whole_simplex_are_the_pure_domains():
    assert np.array_equal(simplex.corners(simplex.whole_simplex(4)), np.eye(4))


# ---- point sets ----


def test_lattice_of_three_domains_by_halves():
    assert simplex.lattice(3, 2).tolist() == [
        [1.0, 0.0, 0.0],
        [0.5, 0.5, 0.0],
        [0.5, 0.0, 0.5],
        [0.0, 1.0, 0.0],
        [0.0, 0.5, 0.5],
        [0.0, 0.0, 1.0],
    ]


@pytest.mark.parametrize(
    ("domains", "steps", "size"),
    [(4, 3, 20), (4, 4, 35), (4, 5, 56), (4, 10, 286), (7, 2, 28), (15, 2, 120), (1, 5, 1)],
)
def test_lattice_sizes(domains, steps, size):
    points = simplex.lattice(domains, steps)
    assert len(points) == size == simplex.lattice_size(domains, steps)
    assert len({tuple(point) for point in points}) == size
    assert np.array_equal(np.round(points * steps) / steps, points)


def test_lattice_has_every_multiple():
    expected = {
        combination
        for combination in itertools.product(range(6), repeat=3)
        if sum(combination) == 5
    }
    points = np.round(simplex.lattice(3, 5) * 5).astype(int)
    assert {tuple(point) for point in points.tolist()} == expected


def test_bounded_lattice_starts_at_the_lower_bounds():
    bounds = Bounds(np.array([0.2, 0.0]), np.array([1.0, 0.5]))
    assert np.allclose(simplex.bounded_lattice(bounds, 4), [[1, 0], [0.8, 0.2], [0.6, 0.4]])


@settings(max_examples=30, deadline=None)
@given(feasible_bounds())
def test_every_dense_point_is_within_the_bounds(bounds):
    points = simplex.dense_points(bounds, np.random.default_rng(0), num=600)
    assert simplex.within(points, bounds).all()


def test_dense_points_leave_no_large_hole():
    bounds = Bounds(np.array([0.0, 0.1, 0.0, 0.0]), np.array([0.4, 0.5, 1.0, 0.3]))
    points = simplex.dense_points(bounds, np.random.default_rng(0))
    probes = simplex.sample_uniform(bounds, 200, np.random.default_rng(1))
    distance = np.linalg.norm(points[None] - probes[:, None], axis=2).min(axis=1)
    assert distance.max() < 0.05


def test_samples_within_cutting_bounds_are_uniform():
    # Where both bounds cut, the region is the hexagon around the centre; its mean is the centre
    # and, by symmetry, all shares have the variance of a direct (rejection) sample.
    bounds = Bounds(np.full(3, 0.1), np.full(3, 0.55))
    drawn = simplex.sample_uniform(bounds, 20_000, np.random.default_rng(0))
    direct = simplex.sample_dirichlet(np.ones(3), 100_000, np.random.default_rng(1))
    direct = direct[simplex.within(direct, bounds)]
    assert np.abs(drawn.mean(axis=0) - 1 / 3).max() < 0.004
    assert np.abs(drawn.std(axis=0) - direct.std(axis=0)).max() < 0.003


def test_dirichlet_survives_a_concentration_near_zero():
    points = simplex.sample_dirichlet(np.full(3, 1e-6), 500, np.random.default_rng(0))
    assert simplex.within(points, simplex.whole_simplex(3)).all()


def test_no_share_is_drawn_below_zero_where_one_is_fixed_and_another_barred():
    bounds = Bounds(np.array([0.1, 0.0, 0.0, 0.0]), np.array([0.1, 0.0, 1.0, 1.0]))
    for seed in range(20):
        points = simplex.sample_uniform(bounds, 200, np.random.default_rng(seed))
        assert (points >= 0).all()
        assert simplex.within(points, bounds).all()
