"""The second-order theory against models that are really trained, on quadratic losses."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from megatron_mergemix.diagnosis.second_order import (
    Expansion,
    Gap,
    compare,
    expansion_error,
    gaps,
    points_of,
    relative_curvatures,
)
from megatron_mergemix.mixtures.merge_weights import component_matrix, merge_weights
from megatron_mergemix.mixtures.simplex import Bounds, uniform, whole_simplex

NUM, SIZE = 3, 10
STEPS = 2000
"""Of a training run: many small ones, so that ``T (T - 1)`` is ``T^2``."""

MIXTURES = ([1 / 3, 1 / 3, 1 / 3], [0.6, 0.3, 0.1], [0.5, 0.0, 0.5])


class World(NamedTuple):
    """Quadratic losses of domains, ``<g, x> + x^T H x / 2``, and how all runs precondition."""

    gradients: np.ndarray
    hessians: np.ndarray
    preconditioner: np.ndarray

    def loss(self, domain: int, x: np.ndarray) -> float:
        return float(self.gradients[domain] @ x + x @ self.hessians[domain] @ x / 2)

    def trained(self, mixture: np.ndarray, horizon: float) -> np.ndarray:
        """Return the weights after gradient descent on a mixture, from 0."""
        gradient = np.einsum("d,di->i", mixture, self.gradients)
        hessian = np.einsum("d,dij->ij", mixture, self.hessians)
        x = np.zeros(SIZE)
        for _ in range(STEPS):
            x = x - horizon / STEPS * self.preconditioner @ (gradient + hessian @ x)
        return x


@pytest.fixture(scope="module", params=["SGD", "preconditioned"])
def world(request: pytest.FixtureRequest) -> World:
    rng = np.random.default_rng(3)
    factors = rng.normal(size=(NUM, SIZE, SIZE)) / np.sqrt(SIZE)
    scales = np.exp(rng.normal(size=SIZE)) if request.param == "preconditioned" else np.ones(SIZE)
    hessians = np.einsum("dij,dkj->dik", factors, factors)
    return World(rng.normal(size=(NUM, SIZE)), hessians, np.diag(scales))


def second_orders(world: World, vectors: np.ndarray) -> list[np.ndarray]:
    return [vectors @ hessian @ vectors.T for hessian in world.hessians]


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_the_gap_is_that_of_trained_models(world: World, share: float) -> None:
    """To first order in the horizon: half of it has half the error."""
    matrix = component_matrix(NUM, share, uniform(NUM))
    errors = []
    for horizon in (0.02, 0.01):
        vectors = np.stack([world.trained(row, horizon) for row in matrix])
        predicted = gaps(second_orders(world, vectors), matrix)
        missed, size = 0.0, 0.0
        for mixture in map(np.array, MIXTURES):
            alpha = merge_weights(mixture, matrix)
            model, proxy = world.trained(mixture, horizon), alpha @ vectors
            for domain in range(NUM):
                real = world.loss(domain, model) - world.loss(domain, proxy)
                missed += (predicted[domain].at(alpha) - real) ** 2
                size += real**2
        errors.append(np.sqrt(missed / size))
    print(errors)
    assert errors[0] < 0.1
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.1)


def test_there_is_no_gap_at_an_expert(world: World) -> None:
    matrix = component_matrix(NUM, 0.25, uniform(NUM))
    vectors = np.random.default_rng(0).normal(size=(NUM, SIZE))
    for gap in gaps(second_orders(world, vectors), matrix):
        assert np.abs(gap.at(uniform(NUM))) > 1e-3
        np.testing.assert_allclose(gap.at(np.eye(NUM)), 0.0, atol=1e-12)


def test_more_experts_than_domains_have_gaps_of_the_same_domains(world: World) -> None:
    """An expert given twice changes nothing but how its weight is divided."""
    vectors = np.random.default_rng(0).normal(size=(NUM, SIZE))
    twice = vectors[[0, 0, 1, 2]]
    one = gaps(second_orders(world, vectors), np.eye(NUM))
    two = gaps(second_orders(world, twice), np.eye(NUM)[[0, 0, 1, 2]])
    for a, b in zip(one, two, strict=True):
        found = b.at(np.array([0.1, 0.3, 0.2, 0.4]))
        assert found == pytest.approx(float(a.at(np.array([0.4, 0.2, 0.4]))))


def test_an_expansion_is_the_loss_where_that_is_quadratic(world: World) -> None:
    vectors = np.random.default_rng(0).normal(size=(NUM, SIZE))
    expansion = Expansion(
        7.0, vectors @ world.gradients[0], vectors @ world.hessians[0] @ vectors.T
    )
    alpha = np.array([[0.2, 0.5, 0.3], [1.2, -0.5, 0.3]])
    measured = np.array([7.0 + world.loss(0, a @ vectors) for a in alpha])
    np.testing.assert_allclose(expansion.at(alpha), measured)
    assert expansion_error(expansion, alpha, measured) == pytest.approx(0.0, abs=1e-12)


def test_what_an_expansion_misses_is_relative_to_what_there_is_to_explain() -> None:
    flat = Expansion(2.0, np.zeros(2), np.zeros((2, 2)))
    assert expansion_error(flat, np.eye(2), np.array([3.0, 1.0])) == pytest.approx(1.0)
    right = Expansion(2.0, np.array([1.0, -0.5]), np.zeros((2, 2)))
    assert expansion_error(right, np.eye(2), np.array([3.0, 1.0])) == pytest.approx(
        0.5 / np.sqrt(2)
    )
    assert expansion_error(flat, np.eye(2), np.array([2.0, 2.0])) == 0.0


def test_gamma_is_the_papers_ratio_of_bends_along_gradients(world: World) -> None:
    hessian, g = world.hessians[1], world.gradients
    vectors = -np.array([[0.3], [2.0], [1.0]]) * g  # of any length
    found = relative_curvatures(
        np.linalg.norm(vectors @ hessian, axis=1), np.linalg.norm(vectors, axis=1), own=1
    )

    def bend(vector: np.ndarray) -> float:
        return float(np.linalg.norm(hessian @ vector) / np.linalg.norm(vector))

    assert found is not None
    np.testing.assert_allclose(found, [bend(g[j]) / bend(g[1]) for j in range(NUM)])
    assert relative_curvatures(np.array([1.0, 0.0]), np.ones(2), own=1) is None


def test_an_offset_changes_no_ranks_and_a_gap_against_the_loss_turns_them() -> None:
    losses = np.random.default_rng(0).normal(size=50)
    offset = compare(losses, np.full(50, -0.3))
    assert (offset.largest, offset.rank_correlation) == (-0.3, pytest.approx(1.0))
    assert offset.spread_ratio == pytest.approx(0.0, abs=1e-12)
    turned = compare(losses, -2 * losses)
    assert turned.spread_ratio == pytest.approx(2.0)
    assert turned.rank_correlation == pytest.approx(-1.0)


def test_points_stand_for_allowed_mixtures() -> None:
    matrix = component_matrix(3, 0.25, uniform(3))
    bounds = Bounds(np.array([0.2, 0.0, 0.0]), np.array([1.0, 0.4, 1.0]))
    mixtures = points_of(bounds, matrix) @ matrix
    np.testing.assert_allclose(mixtures.sum(axis=1), 1.0)
    assert mixtures[:, 0].min() > 0.2 - 1e-9
    assert mixtures[:, 1].max() < 0.4 + 1e-9
    np.testing.assert_array_equal(points_of(bounds, matrix), points_of(bounds, matrix))
    assert points_of(whole_simplex(3), np.eye(3)).min() >= 0


def test_a_gap_takes_many_merges_at_once() -> None:
    gap = Gap(np.random.default_rng(0).normal(size=(3, 3)))
    alpha = np.random.default_rng(1).dirichlet(np.ones(3), size=5)
    np.testing.assert_allclose(gap.at(alpha), [gap.at(each) for each in alpha])
