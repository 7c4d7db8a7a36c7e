"""Scores of reference models: when they count, and the table that is made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_mergemix.config import Config
from megatron_mergemix.errors import SearchError
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.training_runs.experiment_runs import requested_run
from megatron_mergemix.validation.references import comparison, scored_reference
from tests.support.finished import (
    LEARNED,
    finish_reference,
    finish_references,
    finish_search,
    losses,
)
from tests.support.torch_dist import write_checkpoint
from tests.support.untrained import with_experts, write_config

REFERENCES = {
    "learned": losses(1, 1, 2),
    "uniform": losses(1, 2, 3),
    "proportional": losses(1.5, 1.5, 1.5),
}


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    return write_config(tmp_path)


@pytest.fixture
def config(config_path: Path) -> Config:
    return with_experts(config_path)


def test_scores_of_a_finished_reference_count(config: Config) -> None:
    assert scored_reference(config, "uniform") is None
    finish_reference(config, "uniform", REFERENCES["uniform"])
    assert scored_reference(config, "uniform") == REFERENCES["uniform"]
    (requested_run(config, "references/uniform").directory / "finished.json").unlink()
    assert scored_reference(config, "uniform") is None


def test_scores_on_other_windows_are_redone(config_path: Path, config: Config) -> None:
    finish_reference(config, "uniform", REFERENCES["uniform"])
    now = with_experts(config_path, "evaluate.capabilities.code.loss.sequences=4")
    assert scored_reference(now, "uniform") is None


def test_scores_of_other_weights_are_redone(config: Config) -> None:
    finish_reference(config, "uniform", REFERENCES["uniform"])
    run = requested_run(config, "references/uniform")
    write_checkpoint(run.final_checkpoint(), {"weight": torch.zeros(3)})
    assert scored_reference(config, "uniform") is None


def test_references_are_compared_on_the_scale_of_the_search(config: Config) -> None:
    """The experts' losses are 1, 2 and 3 in every capability: a loss x counts (3 - x) / 2."""
    finish_search(config)
    finish_references(config, REFERENCES)
    before = RunDir(config.run_dir).trials.stat()
    rows = comparison(config)
    assert [row["name"] for row in rows] == ["learned", "proportional", "uniform"]
    assert [row["utility"] for row in rows] == pytest.approx([2.5 / 3, 0.75, 0.5])
    assert [row["behind"] for row in rows[1:]] == pytest.approx([0.25 / 3, 1 / 3])
    # Two independent errors of 0.1 in each capability, worth 1/6 of the utility per nat.
    assert rows[1]["behind_stderr"] == pytest.approx(6**0.5 * 0.1 / 6)
    assert rows[0]["mixture"] == pytest.approx(LEARNED)
    assert rows[0]["scores"] == {
        "math": {"loss": 1},
        "code": {"loss": 1},
        "web": {"loss": 2},
    }
    after = RunDir(config.run_dir).trials.stat()
    assert (after.st_mtime_ns, after.st_size) == (before.st_mtime_ns, before.st_size)


def test_a_comparison_does_not_make_a_journal(config: Config) -> None:
    with pytest.raises(SearchError, match="run the search first"):
        comparison(config)
    assert not RunDir(config.run_dir).trials.exists()


def test_trials_of_another_search_give_no_scale(config_path: Path, config: Config) -> None:
    finish_search(config)
    finish_references(config, REFERENCES)
    with pytest.raises(SearchError, match="measured on something else"):
        comparison(with_experts(config_path, "evaluate.capabilities.code.loss.sequences=4"))
