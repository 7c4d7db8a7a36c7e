"""What 0 and 1 of the utility mean in one search."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_mergemix.evaluate.utility import Scale, Utility
from megatron_mergemix.journal import Trial
from megatron_mergemix.simplex import Array


def measurements(trials: Sequence[Trial], utility: Utility) -> tuple[Array, Array]:
    """Return the oriented capability values of the trials and their errors, ``(N, C)`` each."""
    pairs = np.array([utility.measure(trial.scores) for trial in trials])
    pairs = pairs.reshape(len(trials), 2, len(utility.capabilities))
    return pairs[:, 0], pairs[:, 1]


def is_verification(trial: Trial) -> bool:
    """Return whether the trial checks a proposed optimum; such trials calibrate nothing."""
    return trial.purpose.startswith("verify:")


def utility_scale(utility: Utility, trials: Sequence[Trial]) -> Scale:
    """Return the scale that the successful trials of the design fix.

    Neither the base nor verifying trials enter, so the scale does not move once the design is
    measured, and whoever holds the journal computes the same one.

    Raises:
        SearchError: see :meth:`~megatron_mergemix.evaluate.utility.Utility.calibrate`.
    """
    designed = sorted(
        (t for t in trials if t.mixture and t.error is None and not is_verification(t)),
        key=lambda trial: trial.index,
    )
    values, _ = measurements(designed, utility)
    is_vertex = np.array([trial.purpose == "vertex" for trial in designed], dtype=np.bool_)
    return utility.calibrate(values, is_vertex)
