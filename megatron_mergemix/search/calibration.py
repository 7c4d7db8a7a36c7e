"""What 0 and 1 of the utility mean in one search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from megatron_mergemix.evaluate.utility import Scale, Utility
from megatron_mergemix.journal import Trial
from megatron_mergemix.search.first_share import on_all_items
from megatron_mergemix.search.strategy import Proposal
from megatron_mergemix.simplex import Array


def measurements(trials: Sequence[Trial], utility: Utility) -> tuple[Array, Array]:
    """Return the oriented capability values of the trials and their errors, ``(N, C)`` each."""
    pairs = np.array([utility.measure(trial.scores) for trial in trials])
    pairs = pairs.reshape(len(trials), 2, len(utility.capabilities))
    return pairs[:, 0], pairs[:, 1]


_SURE_UNIT = 3.0
"""Standard errors of their difference by which the best and the worst of some domains are likely to
differ by more than chance."""

LATER = ("verify:", "round:", "gradient:", "race:")
"""How the purposes of trials begin that earlier trials decided upon."""


def stage_of(purpose: str) -> str:
    """Return the stage of a hierarchical search, ``math`` of ``math/lattice``; else nothing."""
    return purpose.rpartition("/")[0]


def kind_of(purpose: str) -> str:
    """Return the purpose without its stage."""
    return purpose.rpartition("/")[2]


def is_verification(trial: Trial) -> bool:
    """Return whether the trial checks a proposed optimum."""
    return is_verifying(trial.purpose)


def is_verifying(purpose: str) -> bool:
    """Return whether a candidate is a proposed optimum."""
    return kind_of(purpose).startswith("verify:")


def is_gradient(trial: Trial) -> bool:
    """Return whether the trial was to measure a gradient, so that it has no scores to compare."""
    return kind_of(trial.purpose).startswith("gradient:")


def is_race(purpose: str) -> bool:
    """Return whether a candidate is scored on the items that its first share left."""
    return kind_of(purpose).startswith("race:")


def is_anchor(purpose: str) -> bool:
    """Return whether a candidate is scored on all items at once, whatever ``search.first_share``.

    Every domain alone gives the scale of the utility, the priors are what it is compared with, and
    together they tell how the first share of the items differs from all.
    """
    return kind_of(purpose) in ("base", "vertex", "corner") or kind_of(purpose).startswith(
        ("prior:", "verify:")
    )


def failed_anchors(planned: Sequence[Proposal], trials: Mapping[int, Trial]) -> list[Proposal]:
    """Return the anchors among measured proposals that failed, to be asked once more behind them.

    Args:
        planned: numbered from 0 on, all of them measured.
        trials: index -> trial.
    """
    anchors = (p for p in planned if is_anchor(p.purpose) and not is_verifying(p.purpose))
    failed = (proposal for proposal in anchors if trials[proposal.index].error)
    return [replace(proposal, index=n) for n, proposal in enumerate(failed, len(planned))]


def is_designed(trial: Trial) -> bool:
    """Return whether no earlier trial of its stage decided upon this one."""
    return not kind_of(trial.purpose).startswith(LATER)


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
