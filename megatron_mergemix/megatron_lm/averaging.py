"""The mean of an expert's last saves, where ``experts.average_last`` asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_mergemix.checkpoint.saves import complete_saves
from megatron_mergemix.errors import ConfigError, TrainingError
from megatron_mergemix.merge.checkpoints import Settings, merge_checkpoints
from megatron_mergemix.merge.methods import Recipe
from megatron_mergemix.training_runs import TrainingRun


def averaged_steps(run: TrainingRun, save_interval: int) -> list[int]:
    """Return the steps of the saves whose mean the run ends with.

    Saves at other steps, such as a signal or ``--exit-interval`` make, do not count: a run that was
    interrupted must end with what it would have ended with.

    Raises:
        ConfigError: the run makes fewer saves than it is to average.
    """
    interval = save_interval if save_interval > 0 else run.steps
    planned = sorted({*range(interval, run.steps, interval), run.steps})
    if run.average_last > len(planned):
        raise ConfigError(
            f"experts.average_last is {run.average_last}, but {run.steps} steps with "
            f"--save-interval {save_interval} make {len(planned)} saves. Lower --save-interval."
        )
    return planned[-run.average_last :]


def average_saves(run: TrainingRun, steps: Sequence[int]) -> Path:
    """Write the mean of a run's saves (WSM, arXiv 2507.17634); return its folder.

    Raises:
        TrainingError: one of them is not there any more.
    """
    saves = dict(complete_saves(run.checkpoints))
    gone = [step for step in steps if step not in saves]
    if gone:
        raise TrainingError(
            f"{run.name}: {run.checkpoints} lacks the saves of the steps "
            f"{', '.join(map(str, gone))}, which experts.average_last {run.average_last} needs. "
            f"Remove {run.directory} to train again, and let nothing remove saves."
        )
    summary = merge_checkpoints(
        saves[steps[-1]],
        {saves[step].name: (saves[step], 1.0 / len(steps)) for step in steps},
        Recipe("linear", ()),
        run.checkpoints / "averaged",
        Settings(overwrite=True),
        {"average": "uniform", "last": len(steps)},
    )
    return summary.folder
