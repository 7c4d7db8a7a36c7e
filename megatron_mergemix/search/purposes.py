"""Why a candidate was asked for, as its trial has it on record.

============================ ==================================================================
``base``                     the base itself
``vertex``, ``corner``       a domain alone, or as nearly as bounds allow
``prior:uniform`` and so on  a mixture that the result is compared with
``lattice``, ``fill``        the design
``point``                    given by the user
``round:N``, ``gradient:N``  what the trials before made a strategy ask for
``race:N``                   the rest of the items, of a candidate that was scored on a first share
``verify:argmax`` and so on  a proposed optimum
============================ ==================================================================

In a hierarchical search the name of a stage stands before it, as in ``math/lattice``.
"""

from __future__ import annotations

from megatron_mergemix.trials import Trial

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


def is_designed(trial: Trial) -> bool:
    """Return whether no earlier trial of its stage decided upon this one."""
    return not kind_of(trial.purpose).startswith(LATER)
