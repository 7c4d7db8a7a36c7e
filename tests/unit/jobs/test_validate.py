"""References that fail keep none of the others waiting, and are named in the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_mergemix.config import Config
from megatron_mergemix.errors import DivergedError, EvaluationError, MergeMixError, SearchError
from megatron_mergemix.jobs import evaluate, train, validate
from megatron_mergemix.training_runs.experiment_runs import is_trained, requested_run
from megatron_mergemix.training_runs.run import TrainingRun
from megatron_mergemix.trials import Scores
from megatron_mergemix.validation.references import is_measured, proxy_record, scored_reference
from tests.support.finished import finish_reference, finish_search, losses
from tests.support.untrained import with_experts, write_config

NAMES = ["learned", "uniform", "proportional", "filling-01", "filling-02"]


class Proxy:
    """Knows which checkpoint it is made of."""

    def __init__(self, chunks: Any, base: Path, *_: Any, **__: Any) -> None:
        self.base = base

    def apply(self, weights: Any) -> None:
        pass


class Evaluator:
    """Scores everything alike, but for what it is told not to."""

    kept_tokens = 0

    def __init__(self, failing: str = "", meanwhile: Callable[[], object] = lambda: None) -> None:
        self.failing = failing
        self.scored: list[str] = []
        self._meanwhile = meanwhile

    def begin(self, name: str) -> None:
        self.scored.append(name)

    def evaluate(self, proxy: Proxy) -> Scores:
        self._meanwhile()
        if self.scored[-1] == self.failing:
            raise EvaluationError("math.loss is nan")
        return losses(1, 2, 3)


class Trainer:
    """Finishes every run, but for those that diverge."""

    def __init__(self, diverging: str = "") -> None:
        self.diverging = diverging
        self.trained: list[str] = []

    def __call__(self, run: TrainingRun, config: Config) -> None:
        if run.name == self.diverging:
            raise DivergedError(f"{run.name}: the loss is nan at step 3.")
        self.trained.append(run.name)
        finish_reference(config, run.name.removeprefix("references/"), losses(1, 2, 3))
        (run.directory / "scores.json").unlink()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_config(tmp_path)


@pytest.fixture
def config(path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Return an experiment of five references whose search has ended; nothing needs Megatron."""
    monkeypatch.setattr(evaluate, "ResidentProxy", Proxy)
    monkeypatch.setattr(evaluate, "_bytes_of_scoring", lambda *_: 0)
    monkeypatch.setattr(validate, "build_model", lambda *_, **__: [])
    config = with_experts(path, "validation.space_filling=2")
    finish_search(config)
    return config


def run(config: Config, monkeypatch: pytest.MonkeyPatch, evaluator: Evaluator, trainer: Trainer):
    monkeypatch.setattr(train, "train", trainer)
    monkeypatch.setattr(validate, "evaluator_of", lambda _: evaluator)
    validate.validate(config, [name for name in NAMES if not is_measured(config, name)])


def test_a_reference_that_cannot_be_scored_is_named_and_tried_alone_the_next_time(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, trainer = Evaluator("references_uniform"), Trainer()
    with pytest.raises(MergeMixError) as caught:
        run(config, monkeypatch, first, trainer)
    assert str(caught.value).splitlines() == [
        "1 of 5 references are not measured, so nothing is compared yet: uniform.",
        "references/uniform: math.loss is nan",
        "Start it again to try them alone: all others are kept. If they fail again, set "
        "validation.leave_out=[uniform]: nothing else that is trained or scored is done again.",
    ]
    assert [is_measured(config, name) for name in NAMES] == [name != "uniform" for name in NAMES]
    again, second = Evaluator(), Trainer()
    run(config, monkeypatch, again, second)
    assert (again.scored, second.trained) == (["references_uniform"], [])


def test_a_merge_that_cannot_be_scored_is_named_beside_the_others(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MergeMixError, match="^1 of 5 .*: filling-01.\nmixture filling-01: math"):
        run(config, monkeypatch, Evaluator("mixture_filling-01"), Trainer())
    assert scored_reference(config, "filling-01") is not None
    assert proxy_record(config, "filling-01") is None
    assert proxy_record(config, "filling-02") is not None


def test_a_reference_that_diverges_leaves_the_others_trained_and_scored(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer("references/filling-01")
    with pytest.raises(MergeMixError) as caught:
        run(config, monkeypatch, Evaluator("references_uniform"), trainer)
    assert str(caught.value).splitlines()[:3] == [
        "2 of 5 references are not measured, so nothing is compared yet: filling-01, uniform.",
        "references/filling-01: the loss is nan at step 3.",
        "references/uniform: math.loss is nan",
    ]
    assert "validation.leave_out=[filling-01, uniform]" in str(caught.value)
    assert trainer.trained == [f"references/{name}" for name in NAMES if name != "filling-01"]


def test_leaving_it_out_keeps_everything_else(
    path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MergeMixError):
        run(config, monkeypatch, Evaluator(), Trainer("references/filling-01"))
    now = with_experts(path, "validation={space_filling: 2, leave_out: [filling-01]}")
    assert list(now.references) == [name for name in NAMES if name != "filling-01"]
    assert all(is_measured(now, name) for name in now.references)


def test_references_are_trained_past_one_that_diverges_but_experts_are_not(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer("references/uniform")
    monkeypatch.setattr(train, "train", trainer)
    with pytest.raises(MergeMixError, match=r"nan at step 3.\nIf it fails again, set validation.l"):
        train.train_all(config, ["references/uniform", "references/proportional"])
    assert is_trained(config, "references/proportional")
    for name in ("base", "experts/math"):
        trainer = Trainer(name)
        monkeypatch.setattr(train, "train", trainer)
        monkeypatch.setattr(train, "_look", lambda _, name: (Named(name), False))
        with pytest.raises(DivergedError):
            train.train_all(config, [name, "experts/code"])
        assert trainer.trained == []


class Named:
    def __init__(self, name: str) -> None:
        self.name = name


def test_a_program_that_is_changed_while_a_reference_is_scored_leaves_no_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "score.py"
    script.write_text("first\n")
    words = ["python", str(script), "{checkpoint}", "{output}"]
    code = {"command": {"run": words, "metrics": ["rate"]}}
    path = write_config(tmp_path, {"evaluate": {"capabilities": {"code": code}}})
    monkeypatch.setattr(evaluate, "ResidentProxy", Proxy)
    monkeypatch.setattr(evaluate, "_bytes_of_scoring", lambda *_: 0)
    config = with_experts(path)
    finish_reference(config, "uniform", losses(1, 2, 3))
    (requested_run(config, "references/uniform").directory / "scores.json").unlink()

    def score(meanwhile: Callable[[], object]) -> None:
        evaluator: Any = Evaluator(meanwhile=meanwhile)
        validate._score_unless_done(config, "uniform", [], evaluator)

    with pytest.raises(SearchError, match="references/uniform are not put on record"):
        score(lambda: script.write_text("second, longer\n"))
    assert scored_reference(config, "uniform") is None
    score(lambda: None)
    assert scored_reference(config, "uniform") is not None
