"""``docs/arguments.md`` lists exactly what each stage replaces."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_mergemix.config import Config
from megatron_mergemix.megatron_lm import expert_stage, scoring_stage
from megatron_mergemix.megatron_lm.expert_stage import ExpertStage
from megatron_mergemix.megatron_lm.rewriting import flag_of
from megatron_mergemix.megatron_lm.search_stage import SearchStage
from megatron_mergemix.megatron_lm.stage import Stage
from megatron_mergemix.megatron_lm.train_stage import TrainStage
from megatron_mergemix.training_runs.run import TrainingRun
from tests.unit.megatron_lm.test_mixture_flag import config

PAGE = Path(__file__).parents[3] / "docs" / "arguments.md"


class Launch(argparse.Namespace):
    """Has every argument, unset where nothing is given."""

    def __getattr__(self, name: str) -> Any:
        return None


def launch(**given: Any) -> Launch:
    parallel = {"context_parallel_size": 1, "tensor_model_parallel_size": 1}
    return Launch(ckpt_format="torch_dist", **parallel, **given)


def listed(heading: str) -> list[str]:
    """Return the arguments in the first column of a section's table."""
    (section,) = re.findall(rf"^## {heading}$(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S)
    rows = re.findall(r"^\| (`--.*?) \|", section, re.M)
    flags = [flag for row in rows for flag in re.findall(r"`--([a-z0-9-]+)`", row)]
    assert len(flags) == len(set(flags))
    return sorted(flags)


def replaced(*stages: Stage) -> list[str]:
    names = {name for stage in stages for name in stage.rewriting._changes}
    return sorted(flag_of(name) for name in names)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    base = tmp_path / "base" / "iter_0000004"
    base.mkdir(parents=True)
    for module in (expert_stage, scoring_stage):
        monkeypatch.setattr(module, "base_checkpoint", lambda config: base)
    return config().model_copy(update={"run_dir": tmp_path / "run"})


def test_the_page_lists_what_the_stage_train_replaces(settings: Config, tmp_path: Path) -> None:
    for name in ("data_args.txt", "per_split_data_args.json"):
        (tmp_path / name).touch()
    whole, per_split = (TrainStage(settings, str(tmp_path)) for _ in range(2))
    whole.before_validation(launch())
    per_split.before_validation(launch(train_data_path=["/data"]))
    assert replaced(whole) == replaced(per_split) == listed("train")


def test_the_page_lists_what_a_training_stage_replaces(settings: Config, tmp_path: Path) -> None:
    run = TrainingRun(
        name="experts/math",
        directory=tmp_path,
        mixture={"math": 1.0},
        blend=((1.0, "/data/math"),),
        steps=10,
        lr=1e-3,
        warmup_steps=0,
        seed=1,
        start=None,
        averaged_steps=(5, 10),
        description={},
    )
    nothing_to_validate = settings.blend.model_copy(update={"split": "1,0,0"})
    settings = settings.model_copy(update={"blend": nothing_to_validate})
    stage = ExpertStage(settings, run.name, "expert")
    every_fifth = settings.training.model_copy(update={"save_interval": 5})
    stage.config = settings.model_copy(update={"training": every_fifth})
    args = launch(wandb_exp_name="mine")
    stage.after_parsing(args)
    stage._set_data(args, run)
    stage._set_schedule(args, run)
    stage._set_saves(args, run)
    assert replaced(stage) == listed("expert and reference")


def test_the_page_lists_what_a_scoring_stage_replaces(settings: Config) -> None:
    stage = SearchStage(settings)
    given = {"moe_expert_capacity_factor": 1.25, "fp8": "hybrid", "sequence_parallel": True}
    args = launch(tp_comm_overlap=True, microbatch_group_size_per_vp_stage=8, **given)
    stage.after_parsing(args)
    assert not args.tp_comm_overlap
    assert args.moe_expert_capacity_factor is args.fp8 is None
    assert not args.sequence_parallel
    assert args.microbatch_group_size_per_vp_stage is None
    assert replaced(stage) == listed("search, evaluate and diagnose")


def test_a_capacity_that_a_dispatcher_cannot_be_without_stays(settings: Config) -> None:
    for backend, expected in (("hybridep", None), ("ncclep", 1.5)):
        args = launch(moe_flex_dispatcher_backend=backend, moe_expert_rank_capacity_factor=1.5)
        SearchStage(settings).after_parsing(args)
        assert args.moe_expert_rank_capacity_factor == expected
