"""Which settings and files a search stands on, by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_mergemix.config import Model
from megatron_mergemix.errors import SearchError
from megatron_mergemix.experiment.digests import ensemble_digests, search_digests, trial_digests
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.search.journal import Journal
from tests.support.tiny_dataset import write_dataset
from tests.support.torch_dist import write_checkpoint
from tests.support.untrained import (
    BYTE,
    TOKENS,
    given,
    with_experts,
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
