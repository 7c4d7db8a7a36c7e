"""The training job: the runs that are not done yet, one after the other."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from functools import partial

from megatron_mergemix.config import Config
from megatron_mergemix.config.validation import how_to_leave_out
from megatron_mergemix.errors import DivergedError, TrainingError
from megatron_mergemix.megatron.trainer import train
from megatron_mergemix.processes.distributed import from_rank_0, held_by_rank_0, rank
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.training_runs.experiment_runs import requested_run
from megatron_mergemix.training_runs.run import TrainingRun


def train_all(config: Config, names: Sequence[str]) -> None:
    """Collective: train the named runs in order; what is finished already is not touched.

    Args:
        config: the experiment.
        names: ``"base"``, ``"experts/math"``, ``"references/uniform"``. A run is described only
            when those before it are done, because experts start from the trained base.

    Raises:
        DivergedError: the base or an expert is no longer finite; those after it need it.
        TrainingError: references diverged; says which, and what to do. The others are trained.
    """
    failed = train_each(config, names)
    if failed:
        ways = how_to_leave_out(config, [name.removeprefix("references/") for name in failed])
        raise TrainingError("\n".join([*failed.values(), f"If it fails again, {ways}."]))


def train_each(config: Config, names: Sequence[str]) -> dict[str, str]:
    """Collective: as :func:`train_all`, but return why references diverged, by their run's name.

    Raises:
        DivergedError: the base or an expert is no longer finite; those after it need it.
    """
    failed: dict[str, str] = {}
    for name in names:
        try:
            # On a cluster, experts are trained at the same time in one run_dir, each by one job.
            with held_by_rank_0(RunDir(config.run_dir).lock(name)):
                _train_unless_done(config, name)
        except DivergedError as error:
            if not name.startswith("references/"):
                raise
            failed[name] = str(error)
        # Model and optimizer refer to themselves in circles, and a full GPU does not make Python
        # look for those: without this the next run would need room for both.
        gc.collect()
    return failed


def _train_unless_done(config: Config, name: str) -> None:
    run, is_finished = from_rank_0(partial(_look, config, name))
    if not is_finished:
        train(run, config)
    elif rank() == 0:
        print(f"{name}: already trained", flush=True)


def _look(config: Config, name: str) -> tuple[TrainingRun, bool]:
    """Return the run, and whether it is done."""
    run = requested_run(config, name)
    return run, run.is_finished()
