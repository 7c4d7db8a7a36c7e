"""The mean of a run's last saves."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_mergemix.checkpoint.saves import complete_saves
from megatron_mergemix.merge.checkpoints import Settings, merge_checkpoints
from megatron_mergemix.merge.methods import Recipe
from megatron_mergemix.training_runs.run import TrainingRun
from megatron_mergemix.training_runs.saves import averaged_saves


def average_saves(run: TrainingRun) -> Path:
    """Write the mean of a run's saves (WSM, arXiv 2507.17634); return its folder.

    Raises:
        TrainingError: one of them is not there any more.
    """
    saves = averaged_saves(run, dict(complete_saves(run.checkpoints)))
    # Of a start on whatever node; this one holds the run's lock, so that none is under way.
    for leftover in run.checkpoints.glob(".averaged.building.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    summary = merge_checkpoints(
        saves[-1],
        {path.name: (path, 1.0 / len(saves)) for path in saves},
        Recipe("linear", ()),
        run.checkpoints / "averaged",
        # The other ranks of the launch have nothing left to do.
        Settings(overwrite=True, threads=max(2, min(32, os.cpu_count() or 1))),
        {"average": "uniform", "last": len(saves)},
    )
    return summary.folder
