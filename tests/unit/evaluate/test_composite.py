"""Evaluators of several kinds as one."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_mergemix.errors import ConfigError, EvaluationError, SearchError
from megatron_mergemix.evaluate.composite import CompositeEvaluator
from megatron_mergemix.evaluate.utility import check_scores
from megatron_mergemix.trials import Minibatch, Score


def score(value: float = 1.0, higher: bool = True, unit: str = "") -> Score:
    return Score(value, None, 1, unit, higher)


class Part:
    """Scores what it is told to, and remembers that it was asked."""

    def __init__(self, scores: dict[str, Any], apart: dict[str, Any] | None = None) -> None:
        self.scores, self.apart = scores, apart or {}
        self.asked, self.names = 0, []

    def begin(self, name: str) -> None:
        self.names.append(name)

    def evaluate(self, proxy: Any) -> Any:
        self.asked += 1
        if not self.scores:
            raise EvaluationError("broken")
        return self.scores

    def evaluate_held_out(self, proxy: Any) -> Any:
        return self.apart

    def evaluate_first(self, proxy: Any) -> Any:
        return {name: {"m": score(0.5)} for name in self.scores}

    def evaluate_others(self, proxy: Any, first: Any) -> Any:
        return {name: {"m": score(first[name]["m"].value + 1)} for name in self.scores}


PROXY: Any = None


def test_scores_come_in_the_order_of_the_capabilities() -> None:
    parts = [Part({"b": {"m": score()}, "d": {"m": score()}}), Part({"a": {"m": score()}})]
    joined = CompositeEvaluator({"a": ["m"], "b": ["m"], "d": ["m"]}, None, parts)
    assert list(joined.evaluate(PROXY)) == ["a", "b", "d"]
    joined.begin("trial-001")
    assert [part.names for part in parts] == [["trial-001"]] * 2


def test_held_out_scores_are_those_that_there_are() -> None:
    parts = [Part({"a": {"m": score()}}), Part({"b": {"m": score()}}, {"b": {"m": score(2)}})]
    joined = CompositeEvaluator({"a": ["m"], "b": ["m"]}, None, parts)
    assert joined.evaluate_held_out(PROXY) == {"b": {"m": score(2)}}


def test_a_first_share_and_the_others_are_asked_of_every_kind() -> None:
    parts = [Part({"b": {"m": score()}}), Part({"a": {"m": score()}})]
    both = CompositeEvaluator({"a": ["m"], "b": ["m"]}, None, parts)
    first = both.evaluate_first(PROXY)
    assert list(first) == ["a", "b"]
    assert both.evaluate_others(PROXY, first) == {n: {"m": score(1.5)} for n in ("a", "b")}
    assert [part.asked for part in parts] == [0, 0]
    with pytest.raises(EvaluationError, match="needs the metric 'n'"):
        CompositeEvaluator({"a": ["n"]}, None, parts[1:]).evaluate_first(PROXY)


def test_what_comes_later_is_spared_a_broken_candidate() -> None:
    parts = [Part({}), Part({"a": {"m": score()}})]
    with pytest.raises(EvaluationError, match="broken"):
        CompositeEvaluator({"a": ["m"]}, None, parts).evaluate(PROXY)
    assert parts[1].asked == 0


def test_a_metric_that_nobody_gave_fails_the_candidate() -> None:
    joined = CompositeEvaluator({"a": ["m", "n"]}, None, [Part({"a": {"m": score()}})])
    with pytest.raises(EvaluationError, match="needs the metric 'n' of capability 'a'"):
        joined.evaluate(PROXY)


def test_probabilities_of_tokens_need_a_loss() -> None:
    joined = CompositeEvaluator({"a": ["m"]}, None, [Part({"a": {"m": score()}})])
    for ask in (
        lambda: joined.gradients(PROXY, Minibatch(0, 1.0, 0, ("a",))),
        lambda: joined.token_log_likelihoods(PROXY),
    ):
        with pytest.raises(SearchError, match="no capability is a held-out loss"):
            ask()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (score(higher=True), score(higher=False)),
        (score(higher=False, unit="bits/byte"), score(higher=False, unit="perplexity")),
    ],
)
def test_a_mean_of_what_has_no_common_direction_or_unit_is_refused(first, second) -> None:
    with pytest.raises(ConfigError, match=r"would be the mean of m \(.*\) and n \(.*lower is"):
        check_scores({"a": {"m": first, "n": second}}, {"a": ["m", "n"]})
    check_scores({"a": {"m": first}, "b": {"n": second}}, {"a": ["m"], "b": ["n"]})


def test_right_answers_may_be_averaged_whatever_they_are_called() -> None:
    both = {"m": score(unit="accuracy"), "n": score(unit="exact_match")}
    check_scores({"a": both}, {"a": ["m", "n"]})
