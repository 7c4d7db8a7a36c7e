"""The built-in trainer on real ranks: layouts agree, a killed run loses nothing, averages are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mergemix.config import load_config
from megatron_mergemix.errors import MergeMixError
from megatron_mergemix.run_dir import RunDir
from tests.support.experiment import write_experiment
from tests.support.run_distributed import run_distributed
from tests.support.weights import read_weights

STEPS = 12


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainer")


def experiment(directory: Path, name: str, **changes: Any) -> Path:
    """Write a YAML of its own over shared datasets."""
    path = write_experiment(directory, {"run_dir": str(directory / name), **changes})
    return path.rename(path.with_name(f"{name}.yaml"))


def started(config_path: Path):
    from megatron_mergemix.config import load_config
    from megatron_mergemix.megatron import parallel

    config = load_config(config_path)
    parallel.start(config.parallel)
    return config


def run_called(config, folder: str, **changes: Any):
    """Return the base's run, in a folder of its own and shortened."""
    import dataclasses

    from megatron_mergemix.training_runs.experiment_runs import base_run

    run = base_run(config)
    assert run is not None
    directory = Path(config.run_dir) / folder
    shortened = {"steps": STEPS, "averaged_steps": (STEPS,)}
    return dataclasses.replace(run, directory=directory, **shortened | changes)


def train_straight(config_path: Path, changes: Mapping[str, Any] | None = None) -> str:
    from megatron_mergemix.megatron.trainer import train

    config = started(config_path)
    run = run_called(config, "straight", **(changes or {}))
    train(run, config)
    return str(run.final_checkpoint())


def train_straight_and_interrupted(config_path: Path) -> tuple[str, str]:
    from megatron_mergemix.megatron import trainer

    config = started(config_path)
    straight = run_called(config, "straight")
    trainer.train(straight, config)

    class Killed(Exception):
        pass

    interrupted = run_called(config, "interrupted")
    check = trainer._check_finite

    def kill_at_seven(run, step: int, loss: float, grad_norm: float) -> None:
        if step == 7:
            raise Killed
        check(run, step, loss, grad_norm)

    trainer._check_finite = kill_at_seven
    try:
        trainer.train(interrupted, config)
    except Killed:
        pass
    else:
        raise AssertionError("the run was not interrupted")
    trainer._check_finite = check
    trainer.train(interrupted, config)
    return str(straight.final_checkpoint()), str(interrupted.final_checkpoint())


def test_final_weights_do_not_depend_on_the_layout(directory: Path) -> None:
    weights = {}
    for name, size, parallel in [
        ("one", 1, {"processes": 1, "tensor": 1}),
        ("tensor", 2, {"processes": 2, "tensor": 2}),
        ("data", 2, {"processes": 2, "tensor": 1}),
    ]:
        path = experiment(directory, name, parallel=parallel)
        weights[name] = read_weights(Path(run_distributed(train_straight, size, path)[0]))
    for other in ("tensor", "data"):
        assert weights[other].keys() == weights["one"].keys()
        for key, value in weights["one"].items():
            np.testing.assert_allclose(weights[other][key], value, atol=2e-5, err_msg=key)


def test_pipeline_stages_train_like_one_rank_from_the_same_start(directory: Path) -> None:
    weights, start = [], {}
    for name, parallel in [
        ("start", {"processes": 1, "tensor": 1}),
        ("whole", {"processes": 1, "tensor": 1}),
        ("stages", {"processes": 2, "tensor": 1, "pipeline": 2}),
    ]:
        path = experiment(directory, name, parallel=parallel)
        final = Path(run_distributed(train_straight, parallel["processes"], path, start)[0])
        start = start or {"start": final}
        weights.append(read_weights(final))
    before, whole, stages = weights
    assert stages.keys() == whole.keys()
    for key, value in whole.items():
        assert not np.array_equal(value, before[key])
        np.testing.assert_allclose(stages[key], value, atol=2e-5, err_msg=key)


MOE = {"num_moe_experts": 4, "moe_top_k": 2}


@pytest.mark.parametrize(("steps", "tolerance"), [(1, 0.0), (STEPS, 2e-5)])
def test_moe_experts_begin_and_end_the_same_on_one_rank_and_on_two(
    directory: Path, steps: int, tolerance: float
) -> None:
    """The learning rate of the first step is 0, so that its save holds the first weights."""
    one, two = (
        read_weights(
            Path(
                run_distributed(
                    train_straight,
                    ranks,
                    experiment(
                        directory,
                        f"moe-{ranks}-{steps}",
                        parallel={"processes": ranks, "tensor": 1, "expert": ranks},
                        model=MOE,
                    ),
                    {"steps": steps},
                )[0]
            )
        )
        for ranks in (1, 2)
    )
    assert one.keys() == two.keys()
    for key, value in one.items():
        np.testing.assert_allclose(two[key], value, rtol=0, atol=tolerance, err_msg=key)
    fc1 = next(value for key, value in two.items() if "experts" in key and "fc1" in key)
    drawn = fc1.reshape(2 * 4, -1)  # layers x MoE experts
    assert len(np.unique(drawn[:, 0])) == 8, "MoE experts got the same draw"


SHARDED = {"processes": 2, "tensor": 1, "distributed_optimizer": True}

KINDS: dict[str, dict[str, Any]] = {
    "tensor parallel": {"parallel": {"processes": 2, "tensor": 2}},
    "pipeline parallel": {"parallel": {"processes": 2, "tensor": 1, "pipeline": 2}},
    "sharded optimizer": {"parallel": SHARDED},
    "sharded optimizer bf16": {"parallel": SHARDED, "model": {"precision": "bf16"}},
    "moe": {"parallel": {"processes": 2, "tensor": 1, "expert": 2}, "model": MOE},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_ends_with_the_same_weights(directory: Path, kind: str) -> None:
    path = experiment(directory, kind.replace(" ", "-"), **KINDS[kind])
    straight, interrupted = run_distributed(train_straight_and_interrupted, 2, path)[0]
    expected, found = read_weights(Path(straight)), read_weights(Path(interrupted))
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)


def train_on_after_a_kill_in_the_last_save(config_path: Path) -> dict[str, Any]:
    """Train to the end, leave what kills at the worst moments leave, and train on."""
    import shutil

    from megatron_mergemix.checkpoint.saves import TRACKER
    from megatron_mergemix.megatron.trainer import train
    from megatron_mergemix.run_dir import RunDir

    config = started(config_path)
    run = run_called(config, "killed", averaged_steps=(6, 12))
    train(run, config)
    expected = read_weights(run.final_checkpoint())

    root = run.checkpoints
    (run.directory / "finished.json").unlink()
    shutil.rmtree(root / "averaged")
    (root / TRACKER).write_text("6")  # the last save is in its place, the tracker is not
    train(run, config)
    found = {"tracker": (root / TRACKER).read_text(), "again": read_weights(run.final_checkpoint())}

    (run.directory / "finished.json").unlink()
    shutil.rmtree(root / "iter_0000012")
    for name in (".building_iter_0000012", ".removing_iter_0000003"):
        (root / name).mkdir()
        (root / name / "__0_0.distcp").write_bytes(b"half")
    indices = sorted(RunDir(config.run_dir).cache.rglob("*.npy"))
    assert len(indices) > 5
    for path in indices:
        path.write_bytes(path.read_bytes()[:-1])  # numpy was killed while it wrote this
    train(run, config)
    found["mended"] = read_weights(run.final_checkpoint())
    return found | {"expected": expected, "left": sorted(path.name for path in root.iterdir())}


def test_what_a_kill_leaves_does_not_stop_or_change_the_next_start(directory: Path) -> None:
    changes = {"parallel": {"processes": 1, "tensor": 1}, "training": {"save_interval": 6}}
    path = experiment(directory, "leftovers", **changes)
    [found] = run_distributed(train_on_after_a_kill_in_the_last_save, 1, path)
    assert found["tracker"] == "12", "Megatron's --load would take the save before the last"
    for kind in ("again", "mended"):
        for key, value in found["expected"].items():
            np.testing.assert_array_equal(found[kind][key], value, err_msg=f"{kind} {key}")
    assert found["left"] == [
        "averaged",
        "iter_0000006",
        "iter_0000012",
        "latest_checkpointed_iteration.txt",
    ]


def train_two_runs_without_automatic_collection(config_path: Path) -> list[bool]:
    """Return for each run whether its model is gone when the next one begins."""
    import gc
    import weakref

    from megatron_mergemix.jobs.train import train_all
    from megatron_mergemix.megatron import trainer

    config = started(config_path)
    set_up = trainer._set_up
    models: list[Any] = []
    gone: list[bool] = []

    def watched(run, config):
        gone.extend(model() is None for model in models)
        trainee = set_up(run, config)
        models.append(weakref.ref(trainee.chunks[0].module))
        return trainee

    trainer._set_up = watched
    gc.disable()
    train_all(config, ["base", "experts/math"])
    return [*gone, models[-1]() is None]


def test_a_job_of_several_runs_holds_one_model_at_a_time(directory: Path) -> None:
    path = experiment(
        directory,
        "several",
        parallel={"processes": 1, "tensor": 1},
        base={"train": {"tokens": 512, "lr": 1e-3}},
        experts={"tokens": 512},
    )
    assert run_distributed(train_two_runs_without_automatic_collection, 1, path) == [[True, True]]


def train_averaged(config_path: Path) -> tuple[str, list[str]]:
    from megatron_mergemix.checkpoint.saves import complete_saves
    from megatron_mergemix.megatron.trainer import train

    config = started(config_path)
    run = run_called(config, "averaged", averaged_steps=(6, 9, 12))
    train(run, config)
    return str(run.final_checkpoint()), [str(p) for _, p in complete_saves(run.checkpoints)]


def test_a_result_is_the_mean_of_the_saves_of_its_steps(directory: Path) -> None:
    path = experiment(directory, "averaging", training={"save_interval": 3})
    averaged, saves = run_distributed(train_averaged, 2, path)[0]
    assert [Path(save).name for save in saves] == ["iter_0000006", "iter_0000009", "iter_0000012"]
    each = [read_weights(Path(save)) for save in saves]
    for key, value in read_weights(Path(averaged)).items():
        mean = np.mean([weights[key] for weights in each], axis=0)
        np.testing.assert_allclose(value, mean, rtol=1e-6, atol=1e-8, err_msg=key)
        assert not np.array_equal(value, each[-1][key]), f"{key} did not move between the saves"


def average_what_was_not_saved(config_path: Path) -> str:
    from megatron_mergemix.errors import TrainingError
    from megatron_mergemix.megatron.trainer import train

    config = started(config_path)
    try:
        train(run_called(config, "gone", averaged_steps=(7, 12)), config)
    except TrainingError as error:
        return str(error)
    return ""


def test_a_result_is_not_the_mean_of_fewer_saves_than_it_should_be(directory: Path) -> None:
    path = experiment(directory, "gone", training={"save_interval": 6})
    for message in run_distributed(average_what_was_not_saved, 2, path):
        assert "lacks the saves of the steps 7; its result is the mean of the steps" in message


def learning_rates(config_path: Path) -> list[float]:
    from megatron_mergemix.megatron import trainer

    config = started(config_path)
    trainee = trainer._set_up(run_called(config, "schedule", lr=8e-4, warmup_steps=2), config)
    rates = []
    for _ in range(5):
        rates.append(trainee.optimizer.param_groups[0]["lr"])
        trainee.scheduler.step(increment=1)
    return rates


def test_the_learning_rate_warms_up_and_then_stays(directory: Path) -> None:
    path = experiment(directory, "rates", parallel={"processes": 1, "tensor": 1})
    assert run_distributed(learning_rates, 1, path)[0] == pytest.approx([0, 4e-4, 8e-4, 8e-4, 8e-4])


def start_on(config_path: Path) -> str:
    from megatron_mergemix.errors import MergeMixError

    try:
        started(config_path)
    except MergeMixError as error:
        return str(error)
    return "no error"


def test_another_number_of_ranks_than_configured_is_refused(directory: Path) -> None:
    path = experiment(directory, "ranks", parallel={"processes": 2, "tensor": 1})
    [message] = run_distributed(start_on, 1, path)
    assert message.startswith("parallel.processes is 2, but 1 ranks were started. Start 2 ranks")


def rates_shown_and_tokenizer_given(config_path: Path) -> tuple[list[float], list[int]]:
    from megatron_mergemix.megatron import trainer

    config = started(config_path)
    run = run_called(config, "shown", steps=4, lr=8e-4, warmup_steps=2)
    shown, given = [], []
    advance, dataset = trainer.Progress.advance, trainer.blended_dataset

    def show(bar, *args, **values):
        shown.append(values["lr"])
        advance(bar, *args, **values)

    def build(*args, tokens, **settings):
        given.append(tokens.eod)
        return dataset(*args, tokens=tokens, **settings)

    trainer.Progress.advance, trainer.blended_dataset = show, build
    trainer.train(run, config)
    return shown, given


def test_each_step_shows_the_rate_it_used_and_data_know_the_end_of_a_document(
    directory: Path,
) -> None:
    parallel, training = {"processes": 1, "tensor": 1}, {"log_interval": 1}
    path = experiment(directory, "shown", parallel=parallel, training=training)
    [(rates, eod)] = run_distributed(rates_shown_and_tokenizer_given, 1, path)
    assert rates == pytest.approx([0, 4e-4, 8e-4, 8e-4])
    assert eod == [256]


def train_while_the_test_does(config_path: Path) -> str:
    from megatron_mergemix.jobs.train import train_all

    with pytest.raises(MergeMixError) as caught:
        train_all(started(config_path), ["base"])
    return str(caught.value)


def test_all_ranks_are_told_that_another_job_trains_this_run(directory: Path) -> None:
    path = experiment(directory, "twice")
    run_dir = RunDir(load_config(path).run_dir)
    with run_dir.lock("base"):
        first, second = run_distributed(train_while_the_test_does, 2, path)
    expected = f"base in {run_dir.root} is under way already: process {os.getpid()} on"
    assert first.startswith(expected)
    assert second.startswith(f"rank 0: {expected}")
    assert not run_dir.base.exists()
