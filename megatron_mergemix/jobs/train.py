"""The training job: the runs that are not done yet, one after the other."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from functools import partial

from megatron_mergemix.config import Config
from megatron_mergemix.distributed import from_rank_0, rank
from megatron_mergemix.megatron.trainer import train
from megatron_mergemix.training_runs import TrainingRun, requested_run


def train_all(config: Config, names: Sequence[str]) -> None:
    """Collective: train the named runs in order; what is finished already is not touched.

    Args:
        config: the experiment.
        names: ``"base"``, ``"experts/math"``, ``"references/uniform"``. A run is described only
            when those before it are done, because experts start from the trained base.
    """
    for name in names:
        run, is_finished = from_rank_0(partial(_look, config, name))
        if is_finished:
            if rank() == 0:
                print(f"{name}: already trained", flush=True)
            continue
        train(run, config)
        # Model and optimizer refer to themselves in circles, and a full GPU does not make Python
        # look for those: without this the next run would need room for both.
        gc.collect()


def _look(config: Config, name: str) -> tuple[TrainingRun, bool]:
    """Return the run, and whether it is done."""
    run = requested_run(config, name)
    return run, run.is_finished()
