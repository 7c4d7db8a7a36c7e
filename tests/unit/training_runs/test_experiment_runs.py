"""Which runs there are, what they are made of, and what tells one from another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_mergemix.config import load_config
from megatron_mergemix.errors import ConfigError, TrainingError
from megatron_mergemix.training_runs.experiment_runs import (
    base_run,
    expert_checkpoints,
    expert_run,
    reference_run,
    requested_run,
)
from megatron_mergemix.training_runs.mixtures import (
    component_matrix,
    components,
)
from tests.support.tiny_dataset import write_dataset
from tests.support.torch_dist import write_checkpoint
from tests.support.untrained import BYTE, TOKENS, given, with_base, with_experts

# ---- what decides the result ----

BASE_DECIDES = [
    "model.num_layers=2",
    "model.hidden_size=16",
    "model.num_attention_heads=4",
    "model.num_query_groups=1",
    "model.ffn_hidden_size=48",
    "model.seq_length=4",
    "model.vocab_size=300",
    "model.make_vocab_size_divisible_by=16",
    "model.activation=gelu",
    "model.normalization=LayerNorm",
    "model.position_embedding=learned_absolute",
    "model.tie_embeddings=false",
    "model.num_moe_experts=2",
    "model.init_std=0.01",
    "model.precision=bf16",
    "training.global_batch_size=8",
    "training.adam_beta1=0.8",
    "training.adam_beta2=0.99",
    "training.weight_decay=0.0",
    "training.clip_grad=0.5",
    "base.train.tokens=352",
    "base.train.lr=3e-3",
    "base.train.warmup_steps=1",
    "base.train.mixture=proportional",
    "base.train.seed=2",
    "blend.split='9,1,0'",
]

EXPERT_DECIDES = [
    "experts.tokens=500",
    "experts.lr=1e-3",
    "experts.warmup_steps=1",
    "experts.general_share=0.5",
    "experts.general_mixture=proportional",
    "experts.average_last=1",
    "experts.seed=2",
]

DOES_NOT_DECIDE = [
    "training.log_interval=3",
    "parallel.processes=2",
    "parallel={processes: 2, tensor: 2}",
    "parallel={processes: 2, distributed_optimizer: true}",
    "evaluate.micro_batch_size=2",
    "evaluate.utility.kind=worst",
    "search.trials=50",
    "search.seed=3",
    "blend.train_tokens=500",
    "domains.web.bounds=[0.0, 0.5]",
    "domains.web.max_epochs=4",
]


def base_digest(path: Path, *overrides: str) -> str:
    run = base_run(load_config(path, overrides))
    assert run is not None
    return run.digest()


def expert_digest(path: Path, *overrides: str) -> str:
    return expert_run(with_base(path, *overrides), "math").digest()


@pytest.mark.parametrize("change", BASE_DECIDES)
def test_the_digest_reacts_to_what_decides_the_base(config_path: Path, change: str) -> None:
    assert base_digest(config_path, change) != base_digest(config_path)


@pytest.mark.parametrize("change", EXPERT_DECIDES)
def test_the_digest_reacts_to_what_decides_an_expert(config_path: Path, change: str) -> None:
    assert expert_digest(config_path, change) != expert_digest(config_path)
    assert base_digest(config_path, change) == base_digest(config_path)


@pytest.mark.parametrize("change", DOES_NOT_DECIDE)
def test_the_digest_ignores_layout_search_and_display(config_path: Path, change: str) -> None:
    assert base_digest(config_path, change) == base_digest(config_path)
    assert expert_digest(config_path, change) == expert_digest(config_path)


def test_the_digest_ignores_where_the_run_goes(config_path: Path, tmp_path: Path) -> None:
    moved = f"run_dir={tmp_path / 'elsewhere'}"
    assert base_digest(config_path, moved) == base_digest(config_path)


def test_micro_batches_decide_in_a_mixture_of_experts_alone(config_path: Path) -> None:
    smaller, moe = "training.micro_batch_size=1", "model.num_moe_experts=2"
    assert base_digest(config_path, smaller) == base_digest(config_path)
    assert base_digest(config_path, smaller, moe) != base_digest(config_path, moe)


def test_the_digest_ignores_where_data_lies(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = config_path.parent
    before = base_digest(config_path)
    monkeypatch.chdir(home)
    assert base_digest(config_path, "domains.code.prefixes=[./code]") == before
    (home / "moved").mkdir()
    for file in home.glob("code.*"):
        file.rename(home / "moved" / file.name)
    assert base_digest(config_path, f"domains.code.prefixes=[{home}/moved/code]") == before


def test_the_same_datasets_in_other_shares_are_another_run(config_path: Path) -> None:
    shares = ["{math: 0.5, code: 0.5}", "{math: 0.2, code: 0.8}", "{math: 0.8, code: 0.2}"]
    digests = {base_digest(config_path, f"base.train.mixture={each}") for each in shares}
    assert len(digests) == 3


def test_places_of_saves_decide_when_saves_are_averaged(config_path: Path) -> None:
    every_second = "training.save_interval=2"
    last = "experts.average_last=1"
    assert expert_digest(config_path, every_second) != expert_digest(config_path)
    assert base_digest(config_path, every_second) == base_digest(config_path)
    assert expert_digest(config_path, every_second, last) == expert_digest(config_path, last)


def test_reference_models_are_averaged_as_experts_are(config_path: Path) -> None:
    config = with_base(config_path, "training.save_interval=2")
    reference, expert = reference_run(config, "uniform", {"math": 1.0}), expert_run(config, "math")
    assert len(expert.averaged_steps) > 1
    assert reference.averaged_steps == expert.averaged_steps


def test_changed_tokens_of_one_dataset_change_the_digest(config_path: Path) -> None:
    before = base_digest(config_path)
    write_dataset(config_path.parent / "code", np.split((np.arange(300) + 1) % 250, 10), BYTE)
    assert base_digest(config_path) != before


def test_an_expert_of_another_base_is_another_run(config_path: Path) -> None:
    before = expert_digest(config_path)
    folder = given(config_path, "base", 1.0)
    write_checkpoint(folder, {"embedding.word_embeddings.weight": torch.full((264, 8), 2.0)})
    assert expert_digest(config_path) != before


# ---- mixtures and steps ----


def test_an_expert_is_its_domain_with_a_share_of_general_data(config_path: Path) -> None:
    config = with_base(config_path, "experts.general_share=0.3")
    run = expert_run(config, "code")
    assert run.mixture == pytest.approx({"math": 0.1, "code": 0.8, "web": 0.1})
    prefixes = {Path(prefix).name: weight for weight, prefix in run.blend}
    assert prefixes == pytest.approx({"math": 0.1, "code": 0.8, "web": 0.1}, abs=1e-6)


def test_without_general_data_an_expert_reads_its_domain_alone(config_path: Path) -> None:
    run = expert_run(with_base(config_path, "experts.general_share=0"), "web")
    assert [(weight, Path(prefix).name) for weight, prefix in run.blend] == [(1.0, "web")]


COMPONENTS = (
    "experts.components={algebra: {math: 0.75, web: 0.25}, code: {code: 1}, web: {web: 1.0}, "
    "all: proportional}"
)


def test_components_are_the_rows_and_experts_are_trained_on_them(config_path: Path) -> None:
    config = with_base(config_path, COMPONENTS)
    expected = [[0.75, 0, 0.25], [0, 1, 0], [0, 0, 1], [0.6, 0.3, 0.1]]
    np.testing.assert_array_equal(component_matrix(config), expected)
    assert list(components(config)) == ["algebra", "code", "web", "all"]
    run = expert_run(config, "algebra")
    assert (run.name, run.directory) == ("experts/algebra", config.run_dir / "experts" / "algebra")
    assert run.mixture == {"math": 0.75, "code": 0.0, "web": 0.25} == components(config)["algebra"]
    assert [(weight, Path(prefix).name) for weight, prefix in run.blend] == [
        (0.75, "math"),
        (0.25, "web"),
    ]


def test_the_experts_names_are_known_and_those_of_domains_are_not(config_path: Path) -> None:
    config = with_base(config_path, COMPONENTS)
    assert requested_run(config, "experts/all").mixture["math"] == 0.6
    known = "base, experts/algebra, experts/code, experts/web, experts/all, references/learned"
    with pytest.raises(ConfigError, match=f"no run is called 'experts/math'; there are {known}"):
        requested_run(config, "experts/math")
    with pytest.raises(TrainingError, match="experts/algebra is not trained yet"):
        expert_checkpoints(config)


def test_given_checkpoints_of_components_are_found_by_the_experts_names(config_path: Path) -> None:
    folders = {name: given(config_path, name, 1.0) for name in ("web", "all", "code", "algebra")}
    wanted = {name: str(path) for name, path in folders.items()}
    config = with_base(config_path, COMPONENTS, f"experts.checkpoints={wanted}")
    assert expert_checkpoints(config) == folders
    assert list(expert_checkpoints(config)) == ["algebra", "code", "web", "all"]


def test_a_changed_component_makes_its_own_run_stale_alone(config_path: Path) -> None:
    for name in ("algebra", "web"):
        expert_run(with_base(config_path, COMPONENTS), name).mark_started()
    changed = "experts.components.algebra={math: 0.5, web: 0.5}"
    config = with_base(config_path, COMPONENTS, changed)
    assert not expert_run(config, "web").is_finished()
    with pytest.raises(
        TrainingError, match=r"holds another run: blend\..*math\.weight: 0\.75 -> 0\.5"
    ):
        expert_run(config, "algebra").is_finished()


def test_steps_reach_at_least_the_tokens(config_path: Path) -> None:
    assert base_run(load_config(config_path)).steps == 10  # type: ignore[union-attr]
    assert expert_run(with_base(config_path), "math").steps == 11  # 330 tokens, 32 a step


def test_a_missing_expert_is_named_as_the_command_line_wants_it(config_path: Path) -> None:
    with pytest.raises(TrainingError, match="`mergemix train mix.yaml expert:math` first"):
        expert_checkpoints(with_base(config_path))
    with pytest.raises(TrainingError, match="`mergemix train mix.yaml reference:uniform` first"):
        requested_run(with_base(config_path), "references/uniform").final_checkpoint()


# ---- names ----


def test_runs_are_found_by_name(config_path: Path) -> None:
    config = with_base(config_path)
    assert requested_run(config, "experts/web").directory == config.run_dir / "experts" / "web"
    found = requested_run(config, "references/uniform")
    assert found.name == "references/uniform"
    assert found.mixture == pytest.approx(dict.fromkeys(TOKENS, 1 / 3))
    assert requested_run(load_config(config_path), "base").name == "base"


@pytest.mark.parametrize("name", ["experts/maths", "references/none", "nothing", "experts/"])
def test_an_unknown_run_is_refused_with_the_known_ones(config_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"base, experts/math, .*, references/learned"):
        requested_run(with_base(config_path), name)


def test_what_is_given_is_not_trained(config_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"given by base\.checkpoint; there is nothing to train"):
        requested_run(with_base(config_path), "base")
    config = with_experts(config_path)
    assert expert_checkpoints(config) == {name: given(config_path, name, 0) for name in TOKENS}
    with pytest.raises(ConfigError, match=r"given by experts\.checkpoints; there is nothing"):
        requested_run(config, "experts/math")
