"""The unmodified ``pretrain_gpt.py`` trains, evaluates, saves and resumes in CPU mode."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.megatron_lm import (
    TINY_GPT,
    each_checkout,
    run_pretrain_gpt,
    training_losses,
    validation_losses,
)

TRAINING = (
    *("--mock-data", "--lr", "1e-2", "--lr-decay-style", "constant", "--train-iters", "4"),
    *("--clip-grad", "1.0", "--weight-decay", "0.1", "--log-interval", "1"),
    *("--eval-interval", "2", "--eval-iters", "1", "--save-interval", "2"),
)
LAYOUTS = {
    "TP2": ("--tensor-model-parallel-size", "2"),
    "PP2 sharded": ("--pipeline-model-parallel-size", "2", "--use-distributed-optimizer"),
    "DP2 sharded bf16": ("--use-distributed-optimizer", "--bf16"),
}


@each_checkout()
@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=() if "bf16" in name else pytest.mark.nightly) for name in LAYOUTS],
)
def test_pretrain_gpt_trains_and_resumes_bit_for_bit(
    checkout: Path, layout: str, tmp_path: Path
) -> None:
    arguments = (*TINY_GPT, *TRAINING, *LAYOUTS[layout])
    saves = str(tmp_path / "saves")
    straight = run_pretrain_gpt(checkout, 2, [*arguments, "--save", saves])
    assert straight.returncode == 0, straight.stdout
    losses, evaluations = training_losses(straight.stdout), validation_losses(straight.stdout)
    assert losses.keys() == {1, 2, 3, 4}
    assert losses[4] < losses[1]
    assert evaluations.keys() == {2, 4}

    (tmp_path / "saves" / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = run_pretrain_gpt(checkout, 2, [*arguments, "--load", saves])
    assert resumed.returncode == 0, resumed.stdout
    assert training_losses(resumed.stdout)[3] == losses[3]
    assert validation_losses(resumed.stdout) == {4: evaluations[4]}
