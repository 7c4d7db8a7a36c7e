"""The mean of a run's last saves."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_mergemix.checkpoint.saves import complete_saves
from megatron_mergemix.errors import TrainingError
from megatron_mergemix.merge.checkpoints import Settings, merge_checkpoints
from megatron_mergemix.merge.methods import Recipe
from megatron_mergemix.training_runs.run import TrainingRun


def average_saves(run: TrainingRun) -> Path:
    """Write the mean of a run's saves (WSM, arXiv 2507.17634); return its folder.

    Raises:
        TrainingError: one of them is not there any more.
    """
    steps, saves = run.averaged_steps, dict(complete_saves(run.checkpoints))
    gone = [step for step in steps if step not in saves]
    if gone:
        raise TrainingError(
            f"{run.name}: {run.checkpoints} lacks the saves of the steps "
            f"{', '.join(map(str, gone))}; its result is the mean of the steps "
            f"{', '.join(map(str, steps))}. Remove {run.directory} to train again, and let nothing "
            "remove saves."
        )
    # Of a start on whatever node; this one holds the run's lock, so that none is under way.
    for leftover in run.checkpoints.glob(".averaged.building.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    summary = merge_checkpoints(
        saves[steps[-1]],
        {saves[step].name: (saves[step], 1.0 / len(steps)) for step in steps},
        Recipe("linear", ()),
        run.checkpoints / "averaged",
        Settings(overwrite=True),
        {"average": "uniform", "last": len(steps)},
    )
    return summary.folder
