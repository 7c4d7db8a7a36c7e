"""Norms and cosines from inner products alone, against the vectors themselves."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_mergemix.diagnosis.task_vectors import (
    applied_norm,
    cosines,
    norms,
    norms_along_simplex,
    norms_of_mixtures,
)
from megatron_mergemix.mixtures.merge_weights import component_matrix, merge_weights
from megatron_mergemix.mixtures.simplex import uniform

DOMAINS = ("math", "code", "web")


@pytest.fixture
def vectors() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, 40)) * [[1.0], [2.0], [0.5]]


def test_norms_and_cosines_are_those_of_the_vectors(vectors) -> None:
    products = vectors @ vectors.T
    np.testing.assert_allclose(norms(products), np.linalg.norm(vectors, axis=1))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(cosines(products), unit @ unit.T, atol=1e-14)


def test_an_expert_that_never_moved_has_cosine_zero_with_all(vectors) -> None:
    vectors[1] = 0.0
    found = cosines(vectors @ vectors.T)
    assert found[1].tolist() == [0.0, 0.0, 0.0]
    assert found[0, 0] == pytest.approx(1.0)


def test_the_applied_norm_is_that_of_the_merge_that_stands_for_a_mixture(vectors) -> None:
    products = vectors @ vectors.T
    matrix = component_matrix(3, 0.25, uniform(3))
    mixture = np.array([0.7, 0.3, 0.0])
    alpha = merge_weights(mixture, matrix)
    assert alpha.min() < 0, "an affine merge"
    expected = np.linalg.norm(alpha @ vectors)
    assert applied_norm(products, alpha) == pytest.approx(expected)
    found = norms_of_mixtures(products, matrix, {"learned": mixture, "later": None})
    assert found == {"learned": pytest.approx(expected), "later": None}


def test_orthogonal_experts_of_one_size_move_an_equal_merge_by_the_root_of_their_number() -> None:
    found = norms_along_simplex(4.0 * np.eye(3), np.eye(3), DOMAINS)
    assert found["vertices"] == dict.fromkeys(DOMAINS, pytest.approx(2.0))
    names = ["math + code", "math + web", "code + web"]
    assert found["edges"] == dict.fromkeys(names, pytest.approx(np.sqrt(2.0)))
