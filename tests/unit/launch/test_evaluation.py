"""What ``mergemix evaluate`` shows where some of the models cannot be scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_mergemix.cli import main
from megatron_mergemix.config import Config
from megatron_mergemix.errors import EvaluationError
from megatron_mergemix.evaluation import asked_of, evaluation_digests, publish_evaluation
from megatron_mergemix.launch import evaluation
from tests.support.finished import losses
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
