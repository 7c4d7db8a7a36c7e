"""Scores on held-out items are kept, and not measured twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_mergemix.config import Config
from megatron_mergemix.errors import EvaluationError
from megatron_mergemix.jobs import held_out
from megatron_mergemix.jobs.held_out import measure_held_out
from megatron_mergemix.trials import Score
from tests.unit.megatron_lm.test_mixture_flag import config as any_config


class Model:
    """Is a merge, and its own evaluator."""

    def __init__(self, breaks_at: float | None = None) -> None:
        self.applied: list[dict[str, float]] = []
        self.breaks_at = breaks_at

    def apply(self, weights: dict[str, float]) -> float:
        self.applied.append(dict(weights))
        return 0.0

    def evaluate_held_out(self, proxy: Any) -> Any:
        weight = self.applied[-1]["a"]
        if weight == self.breaks_at:
            raise EvaluationError("broken")
        return {"web": {"loss": Score(weight, None, 2, "nats/token", False, (weight, weight))}}


WANTED = {0: {"a": 0.25}, 7: {"a": 0.5}, 9: {"a": 1.0}}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setattr(held_out, "trial_digests", lambda config: {"base": "x"})
    return any_config().model_copy(update={"run_dir": tmp_path})


def measured(config: Config, model: Any, wanted: Any = WANTED) -> dict[int, float]:
    found = measure_held_out(config, model, model, wanted)
    return {index: scores["web"]["loss"].value for index, scores in found.items()}


def test_every_model_is_scored_once_and_the_base_is_put_back(config: Config) -> None:
    first = Model()
    assert measured(config, first) == {0: 0.25, 7: 0.5, 9: 1.0}
    assert first.applied == [*WANTED.values(), {}]
    again = Model()
    assert measured(config, again) == {0: 0.25, 7: 0.5, 9: 1.0}
    assert again.applied == []


def test_a_start_that_was_killed_is_continued(config: Config) -> None:
    measured(config, Model(), {0: WANTED[0]})
    rest = Model()
    assert measured(config, rest) == {0: 0.25, 7: 0.5, 9: 1.0}
    assert rest.applied == [WANTED[7], WANTED[9], {}]


def test_another_merge_of_the_same_number_is_scored_anew(config: Config) -> None:
    """As of a search that was begun anew within other bounds."""
    measured(config, Model())
    other = Model()
    assert measured(config, other, {**WANTED, 7: {"a": 0.75}}) == {0: 0.25, 7: 0.75, 9: 1.0}
    assert other.applied == [{"a": 0.75}, {}]


def test_other_items_are_scored_anew(config: Config) -> None:
    measured(config, Model())
    evaluate = config.evaluate.model_copy(update={"held_out": 0.4})
    other = Model()
    measured(config.model_copy(update={"evaluate": evaluate}), other)
    assert other.applied == [*WANTED.values(), {}]
    record = json.loads((config.run_dir / "search" / "held_out.json").read_text())
    assert record["digests"]["evaluate.held_out"] == "0.4"


def test_a_model_that_cannot_be_scored_is_left_out(config: Config, capsys) -> None:
    assert measured(config, Model(breaks_at=0.5)) == {0: 0.25, 9: 1.0}
    assert "held out: trial 7 cannot be scored: broken" in capsys.readouterr().out
