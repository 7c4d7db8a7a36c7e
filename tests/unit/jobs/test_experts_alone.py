"""Experts that were no trial are scored when the search ends, once, and not for the search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_mergemix.config import Config
from megatron_mergemix.errors import EvaluationError
from megatron_mergemix.experiment.named_models import asked_of, recorded
from megatron_mergemix.jobs.experts_alone import score_experts
from megatron_mergemix.trials import Score, Scores, Trial
from tests.support.untrained import with_experts, write_config

SCORES: Scores = {"math": {"loss": Score(2.0, None, 2, "nats/token", False, (2.0, 2.0))}}


class Model:
    """Is a merge, and its own evaluator."""

    def __init__(self, breaks_at: str | None = None) -> None:
        self.applied: list[dict[str, float]] = []
        self.breaks_at = breaks_at

    def apply(self, weights: dict[str, float]) -> float:
        self.applied.append(dict(weights))
        return 0.0

    def begin(self, name: str) -> None:
        assert name.startswith("expert")

    def evaluate(self, proxy: Any) -> Scores:
        if self.breaks_at in self.applied[-1]:
            raise EvaluationError("broken")
        return SCORES


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return with_experts(write_config(tmp_path))


def applied(
    config: Config, trials: list[Trial], breaks_at: str | None = None
) -> list[dict[str, float]]:
    model: Any = Model(breaks_at)
    score_experts(config, model, model, trials)
    found: list[dict[str, float]] = model.applied
    return found


def trial(weights: dict[str, float], **changes: Any) -> Trial:
    return Trial(
        **{"index": 0, "purpose": "vertex:math", "scores": SCORES, **changes},
        mixture={"math": 1.0},
        merge_weights=weights,
    )


ALONE = [{"math": 1.0}, {"code": 1.0}, {"web": 1.0}]


def test_each_is_scored_once_as_mergemix_evaluate_would(config: Config) -> None:
    assert applied(config, []) == ALONE
    for name in config.expert_names:
        record = recorded(config, asked_of(config, f"expert:{name}"))
        assert record is not None
        assert record["name"] == f"expert {name}"
        assert record["scores"]["math"]["loss"]["value"] == 2.0
    assert applied(config, []) == []


def test_one_that_a_trial_scored_is_not_scored_again(config: Config) -> None:
    exactly = trial({"math": 1.0, "code": 0.0, "web": 0.0})
    nearly = trial({"math": 0.0, "code": 1.2, "web": -0.2})
    assert applied(config, [exactly, nearly]) == ALONE[1:]


@pytest.mark.parametrize("changes", [{"error": "broken", "scores": {}}, {"first": 0.3}])
def test_a_trial_that_failed_or_saw_a_part_of_the_items_does_not_count(
    config: Config, changes: dict[str, Any]
) -> None:
    assert applied(config, [trial({"math": 1.0}, **changes)]) == ALONE


def test_one_that_cannot_be_scored_is_said_and_keeps_no_other(config: Config, capsys) -> None:
    assert applied(config, [], breaks_at="math") == ALONE
    assert "expert math: broken" in capsys.readouterr().out
    assert recorded(config, asked_of(config, "expert:math")) is None
    assert recorded(config, asked_of(config, "expert:web")) is not None
