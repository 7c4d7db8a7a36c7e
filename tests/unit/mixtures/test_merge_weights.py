from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_mergemix.mixtures import simplex
from megatron_mergemix.mixtures.components import MAX_CONDITION_NUMBER
from megatron_mergemix.mixtures.merge_weights import component_matrix, merge_weights


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 8),
    st.floats(0, 0.9),
    st.integers(0, 1000),
)
def test_merge_weights_stand_for_the_mixture(num, share, seed):
    rng = np.random.default_rng(seed)
    general, mixture = simplex.sample_dirichlet(np.ones(num), 2, rng)
    matrix = component_matrix(num, share, general)
    assert np.abs(matrix.sum(axis=1) - 1).max() < 1e-12
    weights = merge_weights(mixture, matrix)
    assert np.abs(weights @ matrix - mixture).max() < 1e-9
    assert abs(weights.sum() - 1) < 1e-9
    assert np.abs(merge_weights(weights @ matrix, matrix) - weights).max() < 1e-7


def test_merge_weights_of_pure_experts_are_the_mixture_bit_for_bit():
    mixture = np.array([0.1, 1e-15, 0.9 - 1e-15])
    assert merge_weights(mixture, np.eye(3)).tolist() == mixture.tolist()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.77])
def test_the_mixture_of_one_component_is_exactly_that_expert(share):
    matrix = component_matrix(5, share, [0.1, 0.2, 0.3, 0.15, 0.25])
    for expert, row in enumerate(matrix):
        assert merge_weights(row, matrix).tolist() == np.eye(5)[expert].tolist()


def test_a_pure_domain_needs_negative_weights_of_the_other_components():
    matrix = component_matrix(2, 0.5, [0.5, 0.5])  # rows (.75, .25), (.25, .75)
    assert np.allclose(merge_weights([1.0, 0.0], matrix), [1.5, -0.5])


def test_more_components_than_domains_take_the_smallest_weights():
    matrix = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    weights = merge_weights([0.5, 0.5], matrix)
    assert np.allclose(weights, [1 / 3, 1 / 3, 1 / 3])
    assert np.allclose(merge_weights([1.0, 0.0], matrix), [5 / 6, -1 / 6, 1 / 3])


@st.composite
def accepted_components(draw):
    """Return any rows on the simplex, at least as many as domains, that are not refused."""
    num_domains = draw(st.integers(2, 7))
    num_components = draw(st.integers(num_domains, num_domains + 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # A small concentration gives rows with shares of 0, a large one rows that are much alike.
    concentration = np.full(num_domains, draw(st.sampled_from([0.05, 0.3, 1.0, 8.0])))
    matrix = simplex.sample_dirichlet(concentration, num_components, rng)
    assume(np.linalg.cond(matrix) <= MAX_CONDITION_NUMBER)
    return matrix, simplex.sample_dirichlet(np.full(num_domains, 0.3), 1, rng)[0]


@settings(max_examples=200, deadline=None)
@given(accepted_components())
def test_any_components_stand_for_any_mixture_with_the_least_weights_that_do(drawn):
    matrix, mixture = drawn
    weights = merge_weights(mixture, matrix)
    assert np.abs(weights @ matrix - mixture).max() < 1e-9
    assert abs(weights.sum() - 1) < 1e-9
    # All weights that stand for the mixture differ by vectors n with n @ matrix = 0; the shortest
    # of them is at a right angle to every n.
    null = np.linalg.svd(matrix)[0][:, matrix.shape[1] :]
    assert null.shape[1] == len(matrix) - matrix.shape[1]
    assert np.abs(weights @ null).max(initial=0.0) < 1e-9


@settings(max_examples=50, deadline=None)
@given(accepted_components(), st.randoms(use_true_random=False))
def test_the_order_of_experts_changes_no_weight(drawn, random):
    matrix, mixture = drawn
    order = list(range(len(matrix)))
    random.shuffle(order)
    weights = merge_weights(mixture, matrix)
    assert np.abs(merge_weights(mixture, matrix[order]) - weights[order]).max() < 1e-9


def test_a_general_share_of_nothing_is_the_identity():
    assert np.array_equal(component_matrix(3, 0.0, simplex.uniform(3)), np.eye(3))
