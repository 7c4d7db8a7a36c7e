"""What a search stands on: digests of everything its trials depend on, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_mergemix.config import Config, Model, load_config
from megatron_mergemix.errors import CheckpointError, ConfigError, SearchError, TrainingError
from megatron_mergemix.experiment import (
    check_checkpoints,
    check_journal,
    ensemble_digests,
    make_strategy,
    measured_trials,
    merge_weights_of,
    search_digests,
    search_result,
    trial_digests,
)
from megatron_mergemix.files.publishing import publish_json
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.search.journal import Journal
from megatron_mergemix.training_runs.mixtures import component_matrix
from megatron_mergemix.trials import Trial
from tests.support.finished import losses
from tests.support.tiny_dataset import write_dataset
from tests.support.torch_dist import write_checkpoint
from tests.support.untrained import (
    BYTE,
    TOKENS,
    given,
    with_base,
    with_experts,
    write_config,
)

NAMES = {
    "base",
    *(f"expert.{name}" for name in TOKENS),
    *(f"evaluate.{name}" for name in TOKENS),
    *(f"model.{name}" for name in Model.model_fields),
    *(f"component.{name}" for name in TOKENS),
    "search",
    "search.strategy",
    "search.seed",
    "utility",
    "held_out",
    "bounds",
    "proportional",
    "code",
} - {"model.seq_length", "model.init_std", "model.moe_aux_loss_coeff"}
RESULT_ALONE = {"search", "utility", "held_out", "bounds", "proportional", "code"}
ROWS = {f"component.{name}" for name in TOKENS}
COMPONENTS = (
    "{algebra: {math: 0.8, web: 0.2}, code: {code: 1.0}, web: {web: 0.9, math: 0.1}, all: uniform}"
)


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
        ("evaluate.held_out=0.5", {"held_out"}),
        ("search.surrogate=gp", {"search"}),
        ("search.seed=3", {"search", "search.seed"}),
        ("search.strategy=bayesian", {"search", "search.strategy"}),
        ("search.replicas=requests", set()),
        ("search.resident=file", set()),
        ("search.failures=5", set()),
        ("evaluate.utility.kind=worst", {"utility"}),
        ("evaluate.utility.weights={math: 2.0, code: 1.0, web: 1.0}", {"utility"}),
        ("evaluate.capabilities.code.loss.sequences=4", {"evaluate.code"}),
        ("domains.web.bounds=[0.0, 0.5]", {"bounds"}),
        ("experts.general_share=0.5", ROWS),
        ("experts.general_mixture=proportional", ROWS),
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


def test_a_first_share_is_part_of_trials_and_a_search_without_one_has_no_such_digest(
    config_path: Path,
) -> None:
    plain = trial_digests(with_experts(config_path))
    raced = trial_digests(with_experts(config_path, "search.first_share=0.5"))
    assert raced == {**plain, "search.first_share": "0.5 of seed 0"}
    journal = RunDir(with_experts(config_path).run_dir).trials
    Journal(journal, raced)
    with pytest.raises(SearchError, match=r"search.first_share: 0.5 of seed 0 -> \(absent\)"):
        Journal(journal, plain)


def test_an_epoch_limit_is_a_bound(config_path: Path) -> None:
    """web has 100 tokens: two epochs of 1000 tokens are a share of 0.2."""
    assert changed(config_path, "domains.web.max_epochs=2") == {"bounds"}
    assert changed(config_path, "domains.web.max_epochs=2", "blend.train_tokens=100") == set()


def test_probabilities_of_experts_depend_on_the_order_of_windows(config_path: Path) -> None:
    def digests(*settings: str) -> object:
        return ensemble_digests(with_experts(config_path, "search.ensemble=true", *settings))

    assert digests() == digests("search.seed=1")
    raced = digests("search.first_share=0.25")
    assert raced != digests()
    assert raced != digests("search.first_share=0.25", "search.seed=1")


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


def test_more_tokens_of_a_domain_move_the_proportional_mixture(config_path: Path) -> None:
    write_dataset(config_path.parent / "more", [np.arange(50)] * 10)
    prefixes = f"domains.web.prefixes=[{config_path.parent}/web, {config_path.parent}/more]"
    assert changed(config_path, prefixes) == {"proportional"}


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


def with_components(path: Path, *overrides: str) -> Config:
    names = ("algebra", "code", "web", "all")
    experts = {name: str(given(path, name, 2.0 + i)) for i, name in enumerate(names)}
    checkpoints = f"experts.checkpoints={experts}"
    return with_base(path, f"experts.components={COMPONENTS}", checkpoints, *overrides)


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


# ---- merge weights ----


def test_merge_weights_are_of_experts_and_stand_for_the_mixture_of_domains(
    config_path: Path,
) -> None:
    config = with_components(config_path)
    merge_weights = merge_weights_of(config)
    assert merge_weights({}) == dict.fromkeys(config.expert_names, 0.0)
    for mixture in ({"math": 1.0}, {"code": 0.25, "web": 0.75}):
        alpha = merge_weights(mixture)
        assert list(alpha) == ["algebra", "code", "web", "all"]
        reached = np.array(list(alpha.values())) @ component_matrix(config)
        assert reached == pytest.approx([mixture.get(name, 0.0) for name in TOKENS], abs=1e-9)
    assert min(merge_weights({"math": 1.0}).values()) < -0.1


def test_bounds_priors_and_vertices_are_of_mixtures_whatever_the_components(
    config_path: Path,
) -> None:
    bounds = "domains.web.bounds=[0.1, 0.5]"
    plain, own = (
        make_strategy(with_them(config_path, bounds)).ask()
        for with_them in (with_experts, with_components)
    )
    assert plain == own
    assert {proposal.purpose for proposal in own} >= {"vertex", "prior:uniform"}
    assert all(set(proposal.mixture) <= set(TOKENS) for proposal in own)


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
