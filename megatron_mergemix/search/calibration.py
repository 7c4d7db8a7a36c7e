"""What 0 and 1 of the utility mean in one search."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_mergemix.evaluate.utility import Scale, Utility
from megatron_mergemix.mixtures.simplex import Array
from megatron_mergemix.search.first_share import on_all_items
from megatron_mergemix.search.purposes import (
    is_designed,
    is_verification,
    kind_of,
    stage_of,
)
from megatron_mergemix.trials import Trial

_SURE_UNIT = 3.0
"""A gap between the best and the worst domain below this many standard errors may be chance."""


def measurements(trials: Sequence[Trial], utility: Utility) -> tuple[Array, Array]:
    """Return the oriented capability values of the trials and their errors, ``(N, C)`` each."""
    pairs = np.array([utility.measure(trial.scores) for trial in trials])
    pairs = pairs.reshape(len(trials), 2, len(utility.capabilities))
    return pairs[:, 0], pairs[:, 1]


def _fixing(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials of mixtures that no other trial decided upon, of the first stage."""
    measured = on_all_items([trial for trial in trials if not is_verification(trial)])
    designed = sorted(
        (t for t in measured if t.mixture and is_designed(t)), key=lambda trial: trial.index
    )
    return [t for t in designed if stage_of(t.purpose) == stage_of(designed[0].purpose)]


def utility_scale(utility: Utility, trials: Sequence[Trial]) -> Scale:
    """Return the scale that the successful trials of the design fix.

    Neither the base nor trials that others decided upon enter, nor later stages of a hierarchical
    search, so the scale does not move once the first design is measured, and whoever holds the
    journal computes the same one. (With ``search.first_share`` and ``normalize: zscore`` it moves
    as long as candidates of the design get the rest of their items.)

    Raises:
        SearchError: see :meth:`~megatron_mergemix.evaluate.utility.Utility.calibrate`.
    """
    designed = _fixing([trial for trial in trials if trial.error is None])
    values, _ = measurements(designed, utility)
    is_vertex = np.array([kind_of(t.purpose) == "vertex" for t in designed], dtype=np.bool_)
    return utility.calibrate(values, is_vertex)


def notes_on_scale(utility: Utility, trials: Sequence[Trial]) -> list[str]:
    """Return what a reader must know of the scale, one sentence each.

    Only of ``normalize: vertices``, where few measurements decide how much a capability counts.
    """
    if utility.settings.normalize != "vertices" or utility.has_given_scale:
        return []
    stage = stage_of(_fixing([trial for trial in trials if trial.error is None])[0].purpose)
    every = [t for t in trials if kind_of(t.purpose) == "vertex" and stage_of(t.purpose) == stage]
    vertices = [trial for trial in every if trial.error is None]
    missing = [t for t in every if all(t.mixture != other.mixture for other in vertices)]
    notes = _notes_on_small_units(utility, vertices) if len(vertices) > 1 else []
    if missing:
        names = ", ".join(str(trial.index) for trial in missing)
        notes.insert(
            0,
            f"A domain alone could not be scored (trials {names}), so what 0 and 1 of the utility "
            "mean is that of the other domains (evaluate.utility.normalize: vertices).",
        )
    return notes


def _notes_on_small_units(utility: Utility, vertices: Sequence[Trial]) -> list[str]:
    """Say of which capabilities noise decides the unit, and so how much they count."""
    values, _ = measurements(vertices, utility)
    notes = []
    for place, name in enumerate(utility.capabilities):
        if utility.weights[place] == 0:
            continue
        best, worst = (vertices[int(at(values[:, place]))] for at in (np.argmax, np.argmin))
        unit, error = utility.difference(name, best.scores, worst.scores)
        if error and unit < _SURE_UNIT * error:
            notes.append(
                f"The unit of {name} is {unit:.3g}, by how much domains alone differ in it, which "
                f"is {unit / error:.1f} standard errors: noise decides how much {name} counts. "
                "Give it more items, or the weight 0, or use evaluate.utility.normalize: none."
            )
    return notes
