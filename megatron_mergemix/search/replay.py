"""What a journal has measured beside what a strategy asks for, after a kill or elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_mergemix.errors import SearchError
from megatron_mergemix.mixtures.simplex import to_vector
from megatron_mergemix.search.purposes import is_verification, is_verifying, stage_of
from megatron_mergemix.search.strategy import Proposal
from megatron_mergemix.search.verdict import SAME, Candidate
from megatron_mergemix.trials import Trial

NEAR = 2e-3
"""Shares by which a fitted optimum may differ between machines, whose fits round differently."""


def check_asked_for(trial: Trial, wanted: Proposal) -> None:
    """Refuse a trial that a strategy would not have asked for in this place.

    Raises:
        SearchError: shows both.
    """
    if not (is_of_kind(trial, wanted.purpose) and agree(trial.mixture, wanted.mixture)):
        raise SearchError(
            f"Trial {trial.index} of the journal measured {_text(trial.mixture)} "
            f"({trial.purpose}), but these settings ask for {_text(wanted.mixture)} "
            f"({wanted.purpose}). The journal belongs to other domains, tokens, bounds, or "
            "settings of search: restore them, or use another run_dir."
        )


def is_of_kind(trial: Trial, purpose: str) -> bool:
    """Return whether a trial may be what was asked for with a purpose, whatever its mixture."""
    return stage_of(trial.purpose) == stage_of(purpose) and (
        is_verification(trial) == is_verifying(purpose)
    )


def as_verified(candidate: Candidate, trials: Sequence[Trial], domains: Sequence[str]) -> Candidate:
    """Return the candidate as it was measured, where it was, though a fit has moved it a little."""
    for trial in trials:
        if trial.purpose == candidate.purpose:
            measured = to_vector(trial.mixture, domains)
            if np.abs(measured - candidate.mixture).max() <= NEAR:
                return candidate._replace(mixture=measured)
    return candidate


def agree(measured: Mapping[str, float], planned: Mapping[str, float]) -> bool:
    """Return whether two mixtures are the same; the base is the empty one."""
    if not measured or not planned:
        return not measured and not planned
    names = set(measured) | set(planned)
    return all(abs(measured.get(n, 0.0) - planned.get(n, 0.0)) <= SAME for n in names)


def _text(mixture: Mapping[str, float]) -> str:
    shares = ", ".join(f"{name}: {share:.4g}" for name, share in mixture.items())
    return f"{{{shares}}}" if mixture else "the base"
