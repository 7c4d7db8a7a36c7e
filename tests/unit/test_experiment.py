"""What a search stands on: digests of everything its trials depend on, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_mergemix.config import Model, load_config
from megatron_mergemix.errors import CheckpointError, ConfigError, SearchError, TrainingError
from megatron_mergemix.experiment import (
    check_checkpoints,
    check_journal,
    make_strategy,
    measured_trials,
    search_digests,
    search_result,
    trial_digests,
)
from megatron_mergemix.journal import Journal, Trial
from megatron_mergemix.run_dir import RunDir, publish_json
from tests.support.tiny_dataset import write_dataset
from tests.support.torch_dist import write_checkpoint
from tests.support.untrained import BYTE, TOKENS, given, with_experts, write_config

NAMES = {
    "base",
    *(f"expert.{name}" for name in TOKENS),
    *(f"evaluate.{name}" for name in TOKENS),
    *(f"model.{name}" for name in Model.model_fields),
    "components",
    "search",
    "utility",
    "bounds",
    "code",
} - {"model.seq_length", "model.init_std", "model.moe_aux_loss_coeff"}
RESULT_ALONE = {"search", "utility", "bounds", "code"}


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    return write_config(tmp_path)


def changed(path: Path, *overrides: str) -> set[str]:
    """Return the names of the digests in which the overrides differ from the experiment."""
    before, now = search_digests(with_experts(path)), search_digests(with_experts(path, *overrides))
    assert set(before) == set(now) == NAMES
    return {name for name in NAMES if before[name] != now[name]}


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ("search.trials=50", {"search"}),
        ("search.surrogate=gp", {"search"}),
        ("search.seed=3", {"search"}),
        ("evaluate.utility.kind=worst", {"utility"}),
        ("evaluate.utility.weights={math: 2.0}", {"utility"}),
        ("evaluate.capabilities.code.loss.sequences=4", {"evaluate.code"}),
        ("domains.web.bounds=[0.0, 0.5]", {"bounds"}),
        ("experts.general_share=0.5", {"components"}),
        ("experts.general_mixture=proportional", {"components"}),
        ("model.seq_length=4", {f"evaluate.{name}" for name in TOKENS}),
        ("model.precision=bf16", {"model.precision"}),
        ("model.num_attention_heads=4", {"model.num_attention_heads"}),
        ("model.position_embedding=learned_absolute", {"model.position_embedding"}),
        ("model.normalization=LayerNorm", {"model.normalization"}),
    ],
)
def test_a_digest_reacts_to_its_setting_alone(
    config_path: Path, change: str, names: set[str]
) -> None:
    assert changed(config_path, change) == names


def test_an_epoch_limit_is_a_bound(config_path: Path) -> None:
    """web has 100 tokens: two epochs of 1000 tokens are a share of 0.2."""
    assert changed(config_path, "domains.web.max_epochs=2") == {"bounds"}
    assert changed(config_path, "domains.web.max_epochs=2", "blend.train_tokens=100") == set()


@pytest.mark.parametrize(
    "change",
    [
        "parallel={processes: 2, tensor: 2}",
        "training.global_batch_size=8",
        "training.log_interval=1",
        "evaluate.micro_batch_size=2",
        "blend.train_tokens=2000",
        "references={}",
        "model.init_std=0.5",
    ],
)
def test_layout_and_later_stages_are_no_part_of_a_search(config_path: Path, change: str) -> None:
    assert changed(config_path, change) == set()


def test_run_dir_is_no_part_of_a_search(config_path: Path, tmp_path: Path) -> None:
    assert changed(config_path, f"run_dir={tmp_path / 'other'}") == set()


def test_other_weights_of_an_expert_are_another_search(config_path: Path) -> None:
    before = search_digests(with_experts(config_path))
    weights = {"embedding.word_embeddings.weight": torch.full((264, 8), 9.0)}
    write_checkpoint(given(config_path, "code", 0), weights)
    now = search_digests(with_experts(config_path))
    assert {name for name in NAMES if before[name] != now[name]} == {"expert.code"}


def test_other_held_out_data_is_another_search(config_path: Path) -> None:
    before = search_digests(with_experts(config_path))
    write_dataset(config_path.parent / "web_heldout", np.split(np.arange(100) + 1, 10), BYTE)
    now = search_digests(with_experts(config_path))
    assert {name for name in NAMES if before[name] != now[name]} == {"evaluate.web"}


def test_short_settings_can_be_read_in_their_digest(config_path: Path) -> None:
    """Because the error about a changed search shows both."""
    digests = search_digests(with_experts(config_path))
    assert json.loads(digests["search"])["trials"] == 40
    assert json.loads(digests["utility"])["kind"] == "mean"


def test_trials_depend_on_all_but_what_is_made_of_them(config_path: Path) -> None:
    config = with_experts(config_path)
    trials, result = trial_digests(config), search_digests(config)
    assert set(trials) == NAMES - RESULT_ALONE
    assert trials == {name: result[name] for name in trials}


# ---- results and journals ----


def test_a_result_counts_only_with_the_same_digests(config_path: Path) -> None:
    config = with_experts(config_path)
    assert search_result(config) is None
    result = {"mixture": {"math": 1.0}, "digests": search_digests(config)}
    publish_json(RunDir(config.run_dir).result, result)
    assert search_result(config) == result
    assert search_result(with_experts(config_path, "search.seed=1")) is None


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
    assert "components: [[0.8333" in str(caught.value)
    assert "-> [[0.6666" in str(caught.value)
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
    for change in ("search.seed=5", "search.trials=30", "domains.web.bounds=[0.0, 0.5]"):
        with pytest.raises(SearchError, match="The journal belongs to other"):
            check_journal(with_experts(config_path, change))


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


# ---- checkpoints and strategy ----


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


def test_the_strategy_knows_domains_bounds_and_proportions(config_path: Path) -> None:
    strategy = make_strategy(with_experts(config_path, "domains.web.max_epochs=2"))
    asked = {proposal.purpose: proposal.mixture for proposal in reversed(strategy.ask())}
    assert asked["base"] == {}
    # 100 of 1000 tokens belong to web; proportional to tokens gives it less than its limit of 0.2.
    assert asked["prior:proportional"] == pytest.approx({"math": 0.6, "code": 0.3, "web": 0.1})
    assert max(p.mixture.get("web", 0.0) for p in strategy.ask()) == pytest.approx(0.2)


def test_too_few_trials_for_the_domains_are_refused(config_path: Path) -> None:
    with pytest.raises(ConfigError, match="search.trials is 3"):
        make_strategy(with_experts(config_path, "search.trials=3"))


def test_what_is_not_trained_yet_cannot_be_searched(config_path: Path) -> None:
    with pytest.raises(TrainingError, match="`mergemix train mix.yaml base` first"):
        search_digests(load_config(config_path))
