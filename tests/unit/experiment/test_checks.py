"""Which searches can begin, which can go on, and what is said of the others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from megatron_mergemix.config import load_config
from megatron_mergemix.errors import CheckpointError, SearchError, TrainingError
from megatron_mergemix.experiment.checks import check_checkpoints, check_journal
from megatron_mergemix.experiment.digests import search_digests, trial_digests
from megatron_mergemix.experiment.search_record import measured_trials, search_result
from megatron_mergemix.experiment.strategy import make_strategy
from megatron_mergemix.files.publishing import publish_json
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.search.journal import Journal
from megatron_mergemix.trials import Trial
from tests.support.finished import losses
from tests.support.torch_dist import write_checkpoint
from tests.support.untrained import (
    given,
    with_components,
    with_experts,
)


def test_what_the_ensemble_lacks_is_measured_before_a_journal_is_looked_at(
    config_path: Path,
) -> None:
    """As after a damaged file was deleted: later rounds are planned from it."""
    config = with_experts(config_path, "search.ensemble=true", "search.strategy=iterative")
    journal = Journal(RunDir(config.run_dir).trials, trial_digests(config))
    for number, asked in enumerate(make_strategy(config).ask(), start=1):
        scores = losses(1 + number % 3, 2 + number % 4, 3 - number % 2)
        journal.append(Trial(asked.index, asked.purpose, asked.mixture, {}, scores))
    with pytest.raises(SearchError, match="search.ensemble needs"):
        make_strategy(config).tell(journal.trials())
    check_journal(config)


def test_a_journal_of_this_search_can_be_continued(config_path: Path) -> None:
    config = with_experts(config_path)
    check_journal(config)
    assert not RunDir(config.run_dir).trials.exists(), "a check writes nothing"
    journal = Journal(RunDir(config.run_dir).trials, trial_digests(config))
    journal.append(Trial(0, "base", {}, {}, {}, error="failed"))
    check_journal(config)


def test_a_journal_of_another_search_is_refused_by_name(config_path: Path) -> None:
    config = with_experts(config_path)
    Journal(RunDir(config.run_dir).trials, trial_digests(config))
    with pytest.raises(SearchError) as caught:
        check_journal(with_experts(config_path, "experts.general_share=0.5"))
    assert 'component.code: {"code": 0.8333' in str(caught.value)
    assert '-> {"code": 0.6666' in str(caught.value)
    assert "search:" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    ["search.surrogate=gp", "search.top_k=5", "evaluate.utility={kind: worst, normalize: zscore}"],
)
def test_trials_are_kept_when_only_their_use_changes(config_path: Path, change: str) -> None:
    config = with_experts(config_path)
    journal = Journal(RunDir(config.run_dir).trials, trial_digests(config))
    for proposal in make_strategy(config).ask():
        journal.append(Trial(proposal.index, proposal.purpose, proposal.mixture, {}, {}, error="x"))
    publish_json(RunDir(config.run_dir).result, {"digests": search_digests(config)})
    now = with_experts(config_path, change)
    check_journal(now)
    assert len(measured_trials(now)) == 41
    assert search_result(now) is None


def test_trials_of_another_design_are_refused(config_path: Path) -> None:
    config = with_experts(config_path)
    journal = Journal(RunDir(config.run_dir).trials, trial_digests(config))
    for proposal in make_strategy(config).ask():
        journal.append(Trial(proposal.index, proposal.purpose, proposal.mixture, {}, {}, error="x"))
    for change in ("search.trials=30", "domains.web.bounds=[0.0, 0.5]"):
        with pytest.raises(SearchError, match="The journal belongs to other"):
            check_journal(with_experts(config_path, change))
    for change, what in (
        ("search.seed=5", "search.seed: 0 -> 5"),
        ("search.strategy=grid", "search.strategy: mergemix -> grid"),
    ):
        with pytest.raises(SearchError, match=what):
            check_journal(with_experts(config_path, change))


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("search.seed=5", "something else: search.seed: 0 -> 5. "),
        ("search.strategy=bayesian", "something else: search.strategy: mergemix -> bayesian. "),
        ("evaluate.capabilities.code.loss.sequences=4", "something else: evaluate.code: loss, "),
    ],
)
def test_a_journal_without_trials_is_refused_with_the_one_difference_named(
    config_path: Path, change: str, difference: str
) -> None:
    """No strategy could tell yet."""
    config = with_experts(config_path)
    Journal(RunDir(config.run_dir).trials, trial_digests(config))
    with pytest.raises(SearchError) as caught:
        check_journal(with_experts(config_path, change))
    assert difference in str(caught.value)
    assert str(caught.value).count(" -> ") == 1


def test_a_changed_checkpoint_under_a_search_that_began_is_named(config_path: Path) -> None:
    config = with_experts(config_path)
    before = trial_digests(config)
    Journal(RunDir(config.run_dir).trials, before)
    weights = {"embedding.word_embeddings.weight": torch.full((256, 16), 0.5)}
    write_checkpoint(given(config_path, "web", 0), weights)
    after = trial_digests(config)
    with pytest.raises(SearchError) as caught:
        check_journal(config)
    assert f"expert.web: {before['expert.web']} -> {after['expert.web']}. " in str(caught.value)
    assert str(caught.value).count(" -> ") == 1


def test_trials_of_another_model_are_neither_continued_nor_compared(config_path: Path) -> None:
    config = with_experts(config_path)
    Journal(RunDir(config.run_dir).trials, trial_digests(config))
    now = with_experts(config_path, "model.precision=bf16")
    with pytest.raises(SearchError, match='model.precision: "fp32" -> "bf16"'):
        check_journal(now)
    with pytest.raises(SearchError, match="measured on something else than these settings name"):
        measured_trials(now)


def test_a_trial_that_was_not_asked_for_is_refused(config_path: Path) -> None:
    config = with_experts(config_path)
    journal = Journal(RunDir(config.run_dir).trials, trial_digests(config))
    journal.append(Trial(1, "vertex", {"math": 0.5, "code": 0.5, "web": 0.0}, {}, {}))
    with pytest.raises(SearchError, match="Trial 1 of the journal measured"):
        check_journal(config)


def test_a_changed_component_is_named_on_resume_and_the_others_are_not(config_path: Path) -> None:
    config = with_components(config_path)
    Journal(RunDir(config.run_dir).trials, trial_digests(config))
    check_journal(with_components(config_path))
    changed = "experts.components.algebra={math: 0.7, web: 0.3}"
    with pytest.raises(SearchError) as caught:
        check_journal(with_components(config_path, changed))
    assert 'component.algebra: {"math": 0.8, "web": 0.2} -> {"math": 0.7, "web": 0.3}. They' in str(
        caught.value
    )
    assert str(caught.value).count("component.") == 1


def test_an_expert_that_joins_or_leaves_is_named_on_resume(config_path: Path) -> None:
    config = with_components(config_path)
    Journal(RunDir(config.run_dir).trials, trial_digests(config))
    with pytest.raises(SearchError) as caught:
        check_journal(with_experts(config_path))
    assert "component.algebra: " in str(caught.value)
    assert "expert.all: " in str(caught.value)
    assert "-> (absent)" in str(caught.value)
    assert "component.math: (absent) -> " in str(caught.value)


def test_whole_checkpoints_that_fit_pass(config_path: Path) -> None:
    check_checkpoints(with_experts(config_path))


def test_an_expert_of_another_shape_is_refused(config_path: Path) -> None:
    config = with_experts(config_path)
    weights = {"embedding.word_embeddings.weight": torch.ones(264, 16)}
    write_checkpoint(given(config_path, "web", 0), weights)
    with pytest.raises(CheckpointError, match="Expert 'web'.*has other shapes"):
        check_checkpoints(config)


def test_a_cut_off_file_is_refused(config_path: Path) -> None:
    config = with_experts(config_path)
    file = given(config_path, "math", 0) / "__0_0.distcp"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="__0_0.distcp has"):
        check_checkpoints(config)


def test_what_is_not_trained_yet_cannot_be_searched(config_path: Path) -> None:
    with pytest.raises(TrainingError, match="`mergemix train mix.yaml base` first"):
        search_digests(load_config(config_path))
