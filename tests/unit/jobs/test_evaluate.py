"""Scores are put on record only if what they depend on was the same all the time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_mergemix.config import Config
from megatron_mergemix.errors import EvaluationError, SearchError
from megatron_mergemix.experiment.named_models import asked_of, recorded
from megatron_mergemix.jobs import evaluate
from megatron_mergemix.trials import Score, Scores
from tests.support.untrained import with_experts, write_config


class Evaluator:
    """Scores everything alike; something happens meanwhile."""

    kept_tokens = 0

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        self._meanwhile = meanwhile

    def begin(self, name: str) -> None:
        pass

    def evaluate(self, proxy: Any) -> Scores:
        self._meanwhile()
        return {"code": {"rate": Score(0.5, None, 1, "", True)}}


class Proxy:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def apply(self, weights: Any) -> None:
        pass


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "score.py"
    path.write_text("first\n")
    return path


@pytest.fixture
def config(tmp_path: Path, script: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    words = ["python", str(script), "{checkpoint}", "{output}"]
    code = {"command": {"run": words, "metrics": ["rate"]}}
    path = write_config(tmp_path, {"evaluate": {"capabilities": {"code": code}}})
    monkeypatch.setattr(evaluate, "ResidentProxy", Proxy)
    return with_experts(path)


WORDS = ["base", "expert:math", "mixture:uniform"]


def score(config: Config, meanwhile: Callable[[], object]) -> None:
    evaluate.score_missing(config, WORDS, [], Evaluator(meanwhile))  # type: ignore[arg-type]


def test_models_are_put_on_record_and_not_scored_again(config: Config) -> None:
    score(config, lambda: None)
    for word in WORDS:
        record = recorded(config, asked_of(config, word))
        assert record is not None
        assert record["scores"]["code"]["rate"]["value"] == 0.5
    score(config, lambda: pytest.fail("it is on record"))


def test_a_model_that_cannot_be_scored_keeps_none_of_the_others_waiting(config: Config) -> None:
    calls: list[int] = []

    def fail_first() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise EvaluationError("broken")

    with pytest.raises(EvaluationError, match="^mixture uniform: broken$"):
        score(config, fail_first)
    assert len(calls) == 3
    there = [recorded(config, asked_of(config, word)) is not None for word in WORDS]
    assert there == [True, True, False]


def test_a_program_that_is_changed_meanwhile_leaves_no_score_of_either(
    config: Config, script: Path
) -> None:
    with pytest.raises(
        SearchError,
        match=rf"mixture uniform are not put on record: evaluate\.code\.file\.{script} changed",
    ):
        score(config, lambda: script.write_text("second, longer\n"))
    for content in ("second, longer\n", "first\n"):
        script.write_text(content)
        assert [recorded(config, asked_of(config, word)) for word in WORDS] == [None] * 3
