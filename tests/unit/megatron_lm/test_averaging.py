from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_mergemix.errors import TrainingError
from megatron_mergemix.megatron_lm.averaging import average_saves
from megatron_mergemix.training_runs.run import TrainingRun
from tests.support.torch_dist import write_checkpoint
from tests.support.weights import read_weights


def run(directory: Path, *averaged_steps: int) -> TrainingRun:
    return TrainingRun(
        name="experts/math",
        directory=directory,
        mixture={"math": 1.0},
        blend=((1.0, "/data/math"),),
        steps=10,
        lr=1e-3,
        warmup_steps=0,
        seed=1,
        start=None,
        averaged_steps=averaged_steps,
        description={},
    )


def test_the_mean_is_of_the_named_steps_alone(tmp_path: Path) -> None:
    averaged = run(tmp_path, 5, 10)
    for step, value in ((5, 1.0), (7, 100.0), (10, 4.0)):
        folder = averaged.checkpoints / f"iter_{step:07d}"
        write_checkpoint(folder, {"model.weight": torch.full((2, 3), value)})
    left = averaged.checkpoints / ".averaged.building.another-node.123"
    left.mkdir()
    folder = average_saves(averaged)
    assert not left.exists()
    assert folder.is_relative_to(averaged.checkpoints / "averaged")
    (weight,) = read_weights(folder).values()
    assert weight.tolist() == [[2.5] * 3] * 2


def test_a_save_that_is_gone_is_named(tmp_path: Path) -> None:
    averaged = run(tmp_path, 5, 10)
    write_checkpoint(averaged.checkpoints / "iter_0000010", {"model.weight": torch.ones(2)})
    with pytest.raises(TrainingError, match="lacks the saves of the steps 5; its result"):
        average_saves(averaged)
