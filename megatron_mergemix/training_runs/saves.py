"""Which saves of a training run make its result. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_mergemix.errors import ConfigError, TrainingError
from megatron_mergemix.training_runs.run import TrainingRun


def averaged_steps(steps: int, save_interval: int, average_last: int | None) -> tuple[int, ...]:
    """Return the steps of the saves whose mean a run ends with (WSM, arXiv 2507.17634).

    Saves at other steps, such as a signal or ``--exit-interval`` make, do not count: a run that was
    interrupted must end with what it would have ended with.

    Args:
        steps: of the run; its last one is always saved.
        save_interval: steps between saves; 0 for no saves but the last.
        average_last: that many of the last saves; None for those in the last third of the steps.

    Raises:
        ConfigError: the run makes fewer saves than it is to average.
    """
    interval = save_interval or steps
    planned = (*range(interval, steps, interval), steps)
    if average_last is None:
        return tuple(step for step in planned if 3 * step > 2 * steps)
    if average_last > len(planned):
        raise ConfigError(
            f"experts.average_last is {average_last}, but {steps} steps with a save every "
            f"{interval} make {len(planned)} saves. Lower training.save_interval, or "
            "--save-interval of a launch."
        )
    return planned[-average_last:]


def averaged_saves(run: TrainingRun, saves: Mapping[int, Path]) -> list[Path]:
    """Return the folders of the saves whose mean is the result of a run, in order.

    Args:
        run: the run.
        saves: step -> folder of all that are complete.

    Raises:
        TrainingError: one of them is not there any more.
    """
    gone = [step for step in run.averaged_steps if step not in saves]
    if gone:
        raise TrainingError(
            f"{run.name}: {run.checkpoints} lacks the saves of the steps "
            f"{', '.join(map(str, gone))}; its result is the mean of the steps "
            f"{', '.join(map(str, run.averaged_steps))}. Remove {run.directory} to train again, "
            "and let nothing remove saves."
        )
    return [saves[step] for step in run.averaged_steps]
