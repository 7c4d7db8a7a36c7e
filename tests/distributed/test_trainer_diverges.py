"""A run that is no longer finite: all ranks stop, and no save and no result is ever spoiled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.distributed.test_trainer import experiment, run_called, started
from tests.support.run_distributed import run_distributed
from tests.support.weights import read_weights


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("diverges")


def train_too_hot(config_path: Path) -> list[str]:
    """Return why a base, and after it a reference, is no longer finite."""
    from megatron_mergemix.errors import DivergedError
    from megatron_mergemix.megatron.trainer import train

    config, messages = started(config_path), []
    for name in ("base", "references/hot"):
        with pytest.raises(DivergedError) as caught:
            train(run_called(config, name, name=name, lr=1e30, warmup_steps=0), config)
        messages.append(str(caught.value))
    return messages


def test_a_step_that_is_not_finite_stops_all_ranks_with_one_message(directory: Path) -> None:
    messages = run_distributed(train_too_hot, 2, experiment(directory, "too-hot"))
    assert messages[0] == messages[1]
    base, reference = messages[0]
    assert "is nan at step" in base
    assert "Lower the learning rate" in base
    # With another learning rate, the experts would have to be trained again as well.
    assert "is nan at step" in reference
    assert "Lower" not in reference
    assert "Started again it continues from its last save under" in reference


def poison(trainee, what: str, update: int) -> None:
    """Make the ``update``-th optimizer step from now meet or leave NaN, on rank 0 alone."""
    from megatron_mergemix.processes.distributed import rank

    original, calls = trainee.optimizer.step, []

    def step():
        calls.append(None)
        parameter = next(trainee.chunks[0].parameters())
        is_now = len(calls) == update and rank() == 0
        if is_now and what == "gradients":
            parameter.main_grad.view(-1)[0] = float("nan")
        result = original()
        if is_now and what == "weights":
            parameter.data.view(-1)[0] = float("inf")
        return result

    trainee.optimizer.step = step


def train_through_poison(config_path: Path) -> tuple[list[tuple[str, list[str], bool]], str, str]:
    """Return what each poisoned start left, and the saves of an undisturbed and of this run."""
    from megatron_mergemix.checkpoint.saves import complete_saves
    from megatron_mergemix.errors import TrainingError
    from megatron_mergemix.megatron import trainer

    config = started(config_path)
    straight, run = run_called(config, "straight"), run_called(config, "poisoned")
    trainer.train(straight, config)
    set_up, left = trainer._set_up, []
    for what, update in [("gradients", 10), ("gradients", 7), ("weights", 2)]:

        def poisoned(run, config, what=what, update=update):
            trainee = set_up(run, config)
            poison(trainee, what, update)
            return trainee

        trainer._set_up = poisoned
        try:
            trainer.train(run, config)
        except TrainingError as error:
            saves = [path.name for _, path in complete_saves(run.checkpoints)]
            left.append((str(error), saves, (run.directory / "finished.json").exists()))
    trainer._set_up = set_up
    trainer.train(run, config)
    return left, str(straight.final_checkpoint()), str(run.final_checkpoint())


def test_nan_is_never_saved_and_the_save_before_it_goes_on(directory: Path) -> None:
    path = experiment(directory, "poison", parallel={"processes": 2, "tensor": 1})
    (left, straight, final), (elsewhere, _, _) = run_distributed(train_through_poison, 2, path)
    assert left == elsewhere
    expected = [
        ("the norm of the gradients is nan at step 10", "iter_0000005"),
        ("the norm of the gradients is nan at step 12", "iter_0000010"),
        ("a weight is NaN or infinite at step 12", "iter_0000010"),
    ]
    for (message, saves, is_finished), (text, save) in zip(left, expected, strict=True):
        assert text in message
        assert saves == [save]
        assert not is_finished
    found = read_weights(Path(final))
    for key, value in read_weights(Path(straight)).items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)
