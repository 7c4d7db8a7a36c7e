"""What ``mergemix evaluate`` shows where some of the models cannot be scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_mergemix.cli import main
from megatron_mergemix.config import Config
from megatron_mergemix.errors import EvaluationError, MergeMixError
from megatron_mergemix.experiment.named_models import (
    asked_of,
    evaluation_digests,
    publish_evaluation,
)
from megatron_mergemix.launch import evaluation
from tests.support import lm_eval_tasks
from tests.support.finished import losses
from tests.support.launch import write_launch
from tests.support.untrained import TOKENS, given, write_config


def score_the_base(config: Config, job: str, words: Sequence[str], **_: Any) -> Config:
    """Score as a job would whose other models are broken."""
    assert (job, list(words)) == ("evaluate", ["base", "expert:math"])
    base = asked_of(config, "base")
    publish_evaluation(config, base, evaluation_digests(config, base), losses(1, 2, 3), 0.5)
    raise EvaluationError("expert math: the log-probability is nan.")


def test_models_that_were_scored_are_shown_beside_the_error_of_the_others(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(evaluation, "start", score_the_base)
    path = write_config(tmp_path)
    experts = {name: str(given(path, name, 2.0 + n)) for n, name in enumerate(TOKENS)}
    words = [
        f"--set=base={{checkpoint: {given(path, 'base', 1.0)}}}",
        f"--set=experts.checkpoints={experts}",
    ]
    json = tmp_path / "scores.json"
    named = ["base", "expert:math"]
    assert main(["evaluate", str(path), *named, *words, "--json", str(json)]) == 1
    told = capsys.readouterr()
    assert told.err.count("error:") == 1
    assert "expert math: the log-probability is nan." in told.err
    assert "base" in told.out
    assert "2.0000 +- 0.1000" in told.out
    assert "expert math" not in told.out
    assert not json.exists(), "it would not say what is missing"


def test_where_nothing_could_be_scored_the_error_is_that_of_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A launch that was never made has told nothing of the model, and so of no metric."""

    def fail(*_: Any, **__: Any) -> Config:
        raise MergeMixError("the launch with --mergemix-stage evaluate ended with exit code 1")

    monkeypatch.setattr(evaluation, "start", fail)
    path = write_launch(tmp_path, {})
    task = lm_eval_tasks.write_choices(tmp_path, [["a", "b"]])
    words = [
        "--set=tokenizer={kind: byte}",
        f"--set=evaluate.capabilities.asked={{lm_eval: {{tasks: [{task}]}}}}",
    ]
    assert main(["evaluate", str(path), "base", *words]) == 1
    assert "evaluate ended with exit code 1" in capsys.readouterr().err
