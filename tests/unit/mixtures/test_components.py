"""Which component matrices are refused, what is said against them, and how noise is counted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from megatron_mergemix.errors import ConfigError
from megatron_mergemix.mixtures.components import (
    LARGE_NORM,
    amplification,
    check_components,
    noise_notes,
    norm,
    weights_text,
)
from megatron_mergemix.mixtures.merge_weights import component_matrix, merge_weights
from megatron_mergemix.mixtures.simplex import Bounds, sample_uniform, uniform, whole_simplex

DOMAINS = ["math", "code", "web"]
EXPERTS = ["a", "b", "c", "d"]


def refusal(rows: Sequence[Sequence[float]], remedy: str | None = None) -> str:
    matrix = np.array(rows)
    with pytest.raises(ConfigError) as caught:
        check_components(matrix, EXPERTS[: len(matrix)], DOMAINS, remedy)
    return str(caught.value)


@pytest.mark.parametrize(
    "rows",
    [
        np.eye(3),
        np.eye(3)[[2, 0, 1, 0]],
        [[0.8, 0.1, 0.1], [0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [1 / 3, 1 / 3, 1 / 3]],
    ],
)
def test_rows_that_differ_enough_are_accepted(rows: Sequence[Sequence[float]]) -> None:
    check_components(np.array(rows), EXPERTS[: len(rows)], DOMAINS)


def test_fewer_experts_than_domains_are_refused() -> None:
    assert "2 experts cannot stand for every mixture of 3 domains" in refusal(np.eye(3)[:2])


def test_a_large_general_share_is_refused_with_the_condition_number() -> None:
    rows = component_matrix(3, 0.9999, uniform(3))
    text = refusal(rows, "Lower experts.general_share.")
    assert "condition number 1e+04, at most 1000 is accepted. Lower experts.general_share." in text
    assert "Nearly" not in text


def test_two_rows_that_are_nearly_the_same_are_named() -> None:
    text = refusal([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.5, 0.3001, 0.1999]])
    assert "Nearly dependent rows: experts.components.a, experts.components.c." in text


def test_what_more_components_than_domains_have_in_common_is_told() -> None:
    """Twice as much code as math in each, so nobody can tell what one of them does."""
    rows = [[0.1, 0.2, 0.7], [0.3, 0.6, 0.1], [0.2, 0.4, 0.4], [0.05, 0.1001, 0.8499]]
    text = refusal(rows)
    assert "In every component, nearly, math = 0.5 code." in text
    assert "Train one on clearly more of math than that." in text
    assert "dependent rows" not in text
    number = np.linalg.cond(np.array(rows))
    assert f"condition number {number:.3g}, at most 1000" in text


def test_a_domain_that_no_expert_sees_is_named() -> None:
    text = refusal([[1, 0, 0], [0, 1, 0], [0.5, 0.5, 0], [0.2, 0.8, 0]])
    assert "No component has more than a trace of web. Train an expert on web." in text


# ---- noise ----


def test_norms_at_pure_domains_and_at_equal_shares() -> None:
    """Rows (.75, .25) and (.25, .75): a pure domain takes 1.5 and -0.5."""
    found = amplification(component_matrix(2, 0.5, uniform(2)), ["x", "y"], whole_simplex(2))
    assert found.vertices == pytest.approx({"x": 2.5**0.5, "y": 2.5**0.5})
    assert found.uniform == pytest.approx(0.5**0.5)


def test_no_mixture_takes_larger_weights_than_a_pure_domain() -> None:
    matrix = np.array([[0.8, 0.1, 0.1], [0.3, 0.6, 0.1], [0.1, 0.1, 0.8], [0.2, 0.4, 0.4]])
    where, largest = amplification(matrix, DOMAINS, whole_simplex(3)).largest
    assert where == "code"
    mixtures = sample_uniform(whole_simplex(3), 500, np.random.default_rng(0))
    norms = [norm(merge_weights(mixture, matrix)) for mixture in mixtures]
    assert 0.6 * largest < max(norms) <= largest


def test_mixtures_out_of_bounds_do_not_count() -> None:
    matrix, bounds = component_matrix(2, 0.9, uniform(2)), Bounds(np.full(2, 0.4), np.full(2, 0.6))
    assert amplification(matrix, ["x", "y"], whole_simplex(2)).largest[1] > LARGE_NORM
    assert amplification(matrix, ["x", "y"], bounds).largest[1] < LARGE_NORM


def test_merged_noise_is_that_of_one_expert_times_the_norm() -> None:
    """What the report claims of experts whose training noise is independent."""
    alpha = merge_weights([1.0, 0.0], component_matrix(2, 0.5, uniform(2)))
    noise = np.random.default_rng(0).normal(size=(200_000, 2))
    assert (noise @ alpha).std() == pytest.approx(norm(alpha), rel=0.01)


def test_only_large_norms_are_worth_a_note() -> None:
    assert list(noise_notes("math alone", LARGE_NORM)) == []
    [note] = noise_notes("math alone", 4.25)
    assert note.startswith("math alone has merge weights (alpha) of norm 4.25: its proxy has 4.25")


def test_merge_weights_are_said_where_they_are_not_the_mixture() -> None:
    assert weights_text({}, {"a": 0.0}) == ""
    assert weights_text({"a": 0.25, "b": 0.75}, {"a": 0.25, "b": 0.75}) == ""
    text = weights_text({"x": 1.0, "y": 0.0}, {"a": 1.5, "b": -0.5})
    assert text == "alpha a 1.50 b -0.50 (norm 1.58)"
