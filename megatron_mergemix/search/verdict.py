"""Which verified mixture is recommended, by how much, and what a reader must know.

The best of many noisy measurements is mostly the luckiest one, so candidates are not compared by
their measurements alone but by what surrogates expect of them after they have learned every
trial, verifications included (per capability the one with the least leave-one-out error). Where
the noise is small that is the measurement; where it is large, lucky trials are not believed. On
synthetic benchmarks this halves the regret of taking the highest measurement where measurements
are noisy, and costs nothing where they are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from megatron_mergemix.journal import Trial
from megatron_mergemix.search.calibration import is_verification
from megatron_mergemix.search.landscape import Landscape
from megatron_mergemix.search.strategy import Recommendation
from megatron_mergemix.simplex import Array, Bounds, project, to_vector, within

SAME = 1e-6
"""Mixtures whose shares all agree to this are one mixture: a resumed search may run on another
machine, whose last bits differ."""

POOR_RANKING = 0.5
"""A leave-one-out rank correlation below this earns a warning."""


class Candidate(NamedTuple):
    """A mixture that is worth a real merge.

    Attributes:
        name: as in :attr:`~megatron_mergemix.search.strategy.Recommendation.source`.
        purpose: of the trial that verifies it.
        mixture: ``(D,)``.
    """

    name: str
    purpose: str
    mixture: Array


def is_same(first: Array, second: Array) -> bool:
    """Return whether two vectors are one mixture."""
    return float(np.abs(first - second).max()) <= SAME


def trial_of(mixture: Array, trials: Sequence[Trial], domains: Sequence[str]) -> Trial | None:
    """Return the trial that measured the mixture, a successful one before a failed one."""
    at = [t for t in trials if t.mixture and is_same(mixture, to_vector(t.mixture, domains))]
    return min(at, key=lambda trial: (trial.error is not None, trial.index), default=None)


def give_verdict(
    candidates: Sequence[Candidate],
    priors: Mapping[str, Array],
    trials: Sequence[Trial],
    domains: Sequence[str],
    bounds: Bounds,
    landscape: Landscape,
) -> Recommendation:
    """Return the verified candidate, or the best observed mixture, that the trials speak for.

    Args:
        candidates: in order of preference when all else is equal.
        priors: name -> mixture a person would try, listed for comparison.
        trials: all trials of the search.
        domains: their order is the order of all vectors.
        bounds: a measured mixture outside them cannot win.
        landscape: what predicted the candidates.
    """
    utility, scale = landscape.utility, landscape.scale
    usable = [
        trial
        for trial in trials
        if trial.mixture
        and trial.error is None
        and within(to_vector(trial.mixture, domains), bounds)
    ]
    designed = [trial for trial in usable if not is_verification(trial)]
    best = max(designed, key=lambda trial: utility.of_trial(trial.scores, scale).value)
    wanted = {candidate.name: candidate.mixture for candidate in candidates}
    wanted["best observed"] = to_vector(best.mixture, domains)
    eligible = list(wanted)
    wanted |= {name: project(prior, bounds) for name, prior in priors.items()}

    alternatives = _compare(wanted, usable, domains, landscape)
    winner = max(
        (name for name in eligible if name in alternatives),
        key=lambda name: alternatives[name]["expected"],
    )
    _add_gains(alternatives, winner, usable, landscape)
    return Recommendation(
        mixture=alternatives[winner]["mixture"],
        source=winner,
        utility=alternatives[winner]["observed"],
        utility_stderr=alternatives[winner]["stderr"],
        alternatives=alternatives,
        surrogates=landscape.evidence,
        notes=[
            *_notes_on_surrogates(landscape),
            *_notes_on_candidates(candidates, alternatives, winner),
            *_notes_on_gains(priors, alternatives),
        ],
    )


def _compare(
    wanted: Mapping[str, Array],
    usable: Sequence[Trial],
    domains: Sequence[str],
    landscape: Landscape,
) -> dict[str, dict[str, Any]]:
    """Return the numbers of every wanted mixture that was measured."""
    expect = Landscape(usable, domains, landscape.utility, landscape.scale, "auto")
    alternatives: dict[str, dict[str, Any]] = {}
    for name, mixture in wanted.items():
        trial = trial_of(mixture, usable, domains)
        if trial is None:
            continue
        observed = landscape.utility.of_trial(trial.scores, landscape.scale)
        alternatives[name] = {
            "mixture": dict(trial.mixture),
            "trial": trial.index,
            "predicted": float(landscape(mixture[None])[0]),
            "observed": observed.value,
            "stderr": observed.stderr,
            "expected": float(expect(mixture[None])[0]),
        }
    return alternatives


def _add_gains(
    alternatives: Mapping[str, dict[str, Any]],
    winner: str,
    trials: Sequence[Trial],
    landscape: Landscape,
) -> None:
    """Add to each alternative by how much the winner measured more, and the error of that."""
    scores = {trial.index: trial.scores for trial in trials}
    best = alternatives[winner]["trial"]
    for other in alternatives.values():
        if other["trial"] == best:
            other["gain"], other["gain_stderr"] = 0.0, 0.0
            continue
        gain = landscape.utility.gain(scores[best], scores[other["trial"]], landscape.scale)
        other["gain"], other["gain_stderr"] = gain


def _notes_on_surrogates(landscape: Landscape) -> list[str]:
    return [
        f"The surrogate of {capability} ranks left-out trials poorly (Spearman "
        f"{evidence['spearman']:.2f}): its optimum is hardly better than a guess."
        for capability, evidence in landscape.evidence.items()
        if evidence["spearman"] < POOR_RANKING
    ]


def _notes_on_candidates(
    candidates: Sequence[Candidate], alternatives: Mapping[str, Mapping[str, Any]], winner: str
) -> list[str]:
    notes = [
        f"The {candidate.name} candidate was not measured successfully, so it could not win."
        for candidate in candidates
        if candidate.name not in alternatives
    ]
    chosen, luckiest = alternatives[winner], alternatives["best observed"]
    if luckiest["observed"] > chosen["observed"]:
        notes.append(
            f"Trial {luckiest['trial']} measured {luckiest['observed']:.4g}, the {winner} "
            f"{chosen['observed']:.4g}; in the light of all trials {luckiest['expected']:.4g} and "
            f"{chosen['expected']:.4g} are expected of them."
        )
    return notes


def _notes_on_gains(
    priors: Mapping[str, Array], alternatives: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    notes = []
    for name in priors:
        if name not in alternatives:
            continue
        gain, stderr = alternatives[name]["gain"], alternatives[name]["gain_stderr"]
        if gain <= 0:
            notes.append(f"The recommended mixture does not measure more than {name}.")
        elif stderr is not None and gain < 2 * stderr:
            notes.append(
                f"The gain over {name}, {gain:.4g}, is less than twice its standard error, "
                f"{stderr:.4g}."
            )
    return notes
