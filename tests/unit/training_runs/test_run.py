"""When a run is done, and what is said of a stale one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_mergemix.config import load_config
from megatron_mergemix.errors import TrainingError
from megatron_mergemix.training_runs.experiment_runs import (
    base_checkpoint,
    base_run,
)
from tests.support.tiny_dataset import write_dataset
from tests.support.torch_dist import write_checkpoint
from tests.support.untrained import BYTE


def finish(path: Path, *overrides: str) -> None:
    """Do what the trainer does to a base's folder, but for the training."""
    run = base_run(load_config(path, overrides))
    assert run is not None
    run.mark_started()
    write_checkpoint(run.checkpoints / "iter_0000010", {"weight": torch.ones(2)})
    run.mark_finished({"checkpoint": "checkpoints/iter_0000010"})


def test_a_run_is_finished_when_it_says_so(config_path: Path) -> None:
    run = base_run(load_config(config_path))
    assert run is not None
    assert not run.is_finished()
    run.mark_started()
    assert not run.is_finished()
    with pytest.raises(TrainingError, match="base is not trained yet.*mergemix train mix.yaml bas"):
        run.final_checkpoint()
    finish(config_path)
    assert run.is_finished()
    assert run.final_checkpoint() == run.directory / "checkpoints" / "iter_0000010"
    record = json.loads((run.directory / "run.json").read_text())
    assert record["digest"] == run.digest()


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        (["base.train.lr=5e-3"], "lr: 0.001 -> 0.005."),
        (["model.num_layers=2"], "model.num_layers: 1 -> 2."),
        (["model.num_query_groups=1"], "model.num_query_groups: null -> 1."),
        (["base.train.seed=3", "base.train.lr=5e-3"], "lr: 0.001 -> 0.005, seed: 1 -> 3."),
    ],
)
def test_a_stale_run_says_what_differs_and_what_to_do(
    config_path: Path, changes: list[str], difference: str
) -> None:
    finish(config_path)
    run = base_run(load_config(config_path, changes))
    assert run is not None
    for question in (run.is_finished, run.final_checkpoint):
        with pytest.raises(TrainingError) as caught:
            question()
        message = str(caught.value)
        assert f"{run.directory} holds another run: {difference}" in message
        assert f"Choose another run_dir, or remove {run.directory} to train again." in message


def test_a_changed_dataset_is_named_by_its_prefix(config_path: Path) -> None:
    finish(config_path)
    write_dataset(config_path.parent / "code", np.split((np.arange(300) + 1) % 250, 10), BYTE)
    run = base_run(load_config(config_path))
    assert run is not None
    with pytest.raises(TrainingError) as caught:
        run.is_finished()
    assert f"another run: blend.{config_path.parent / 'code'}.data: " in str(caught.value)
    assert "weight" not in str(caught.value)


def test_a_base_that_is_stale_is_not_searched_on(config_path: Path) -> None:
    finish(config_path)
    assert base_checkpoint(load_config(config_path)).name == "iter_0000010"
    with pytest.raises(TrainingError, match="holds another run"):
        base_checkpoint(load_config(config_path, ["base.train.seed=3"]))


def test_many_differences_are_counted(config_path: Path) -> None:
    finish(config_path)
    changes = ["hidden_size=16", "num_layers=3", "init_std=0.5", "seq_length=4"]
    run = base_run(load_config(config_path, [f"model.{change}" for change in changes]))
    assert run is not None
    with pytest.raises(TrainingError, match=r"model\.seq_length: 8 -> 4, and 1 more\."):
        run.is_finished()  # the four, and the steps
