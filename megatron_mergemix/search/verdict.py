"""Which verified mixture is recommended, by how much, and what a reader must know.

The best of many noisy measurements is mostly the luckiest one, so candidates are not compared by
their measurements alone but by what surrogates expect of them after they have learned every
trial, verifications included (per capability the one with the least leave-one-out error). Where
the noise is small that is the measurement; where it is large, lucky trials are not believed. On
synthetic benchmarks this halves the regret of taking the highest measurement where measurements
are noisy, and costs nothing where they are not.

The surrogates expect too much of their own argmax, also once it is measured: a measurement is one
noisy trial more. So a strategy may have a favourite that does not share that optimism, the mean
of the best predicted mixtures, which loses only to what is surely better. On synthetic searches
(``tools/bench_strategies.py``; 24 trials, 16 surfaces, the design of that time) this lowered the
regret from 0.33 to 0.23 points of accuracy at 7 domains and from 0.15 to 0.14 at 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from megatron_mergemix.mixtures.simplex import Array, Bounds, project, to_vector
from megatron_mergemix.search.calibration import notes_on_scale
from megatron_mergemix.search.first_share import teaching
from megatron_mergemix.search.landscape import Landscape
from megatron_mergemix.search.purposes import is_gradient, is_verification
from megatron_mergemix.search.strategy import Recommendation
from megatron_mergemix.search.uncertainty import (
    SURE,
    ExtraWorth,
    Posterior,
    Uncertainty,
    how_sure,
    is_surely_better,
    no_preference,
)
from megatron_mergemix.trials import Trial

SAME = 1e-6
"""Mixtures whose shares all agree to this are one mixture: a resumed search may run on another
machine, whose last bits differ."""

POOR_RANKING = 0.5
"""A leave-one-out rank correlation below this earns a warning."""

SMALL_SHARE = 0.2
"""Of an even share: of mixtures with less of a domain merges are too optimistic."""


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
    """Return the trial that scored the mixture; a failed one where no other did.

    One on all items comes before one on their first share.
    """
    scored = [trial for trial in trials if trial.mixture and not is_gradient(trial)]
    at = [trial for trial in scored if is_same(mixture, to_vector(trial.mixture, domains))]
    return min(at, key=lambda t: (t.error is not None, t.first is not None, t.index), default=None)


def give_verdict(
    candidates: Sequence[Candidate],
    priors: Mapping[str, Array],
    trials: Sequence[Trial],
    domains: Sequence[str],
    bounds: Bounds,
    landscape: Landscape,
    preference: ExtraWorth = no_preference,
    seed: int = 0,
    favourite: str | None = None,
) -> Recommendation:
    """Return the verified candidate, or the best observed mixture, that the trials speak for.

    Args:
        candidates: in order of preference when all else is equal.
        priors: name -> mixture a person would try, listed for comparison.
        trials: all trials of the search; those on a first share of the items teach, and cannot win.
        domains: their order is the order of all vectors.
        bounds: a measured mixture outside them cannot win.
        landscape: what predicted the candidates.
        preference: decides comparisons together with the utility.
        seed: of the draws behind the uncertainty.
        favourite: the candidate that wins unless another is surely better.
    """
    taught = teaching(trials, domains, bounds)
    expect = landscape.learned_from(taught, domains)
    usable = [trial for trial in taught if trial.first is None]
    wanted = {candidate.name: candidate.mixture for candidate in candidates}
    wanted["best observed"] = _best_observed(usable, domains, landscape, preference)
    wanted |= {name: project(prior, bounds) for name, prior in priors.items()}
    alternatives = _compare(wanted, usable, domains, landscape, expect)
    posterior = Posterior(expect, usable, domains)
    measured = {name: wanted[name] for name in alternatives if name not in priors}
    winner = _winner(measured, alternatives, favourite, posterior, preference, seed)
    _add_gains(alternatives, winner, usable, landscape)
    sure = how_sure(
        wanted[winner],
        _others(wanted, (*priors, "best observed"), wanted[winner]),
        {name: wanted[name] for name in priors},
        domains,
        bounds,
        posterior,
        preference,
        seed,
    )
    return Recommendation(
        mixture=alternatives[winner]["mixture"],
        source=winner,
        utility=alternatives[winner]["observed"],
        utility_stderr=alternatives[winner]["stderr"],
        **sure._asdict(),
        alternatives=alternatives,
        surrogates=landscape.evidence,
        notes=[
            *_notes_on_measuring(landscape, trials),
            *_notes_on_candidates(candidates, alternatives, winner),
            *_notes_on_priors(priors, alternatives, sure),
            *_notes_on_small_shares(alternatives[winner]["mixture"]),
        ],
    )


def _winner(
    mixtures: Mapping[str, Array],
    alternatives: Mapping[str, Mapping[str, Any]],
    favourite: str | None,
    posterior: Posterior,
    preference: ExtraWorth,
    seed: int,
) -> str:
    """Return the name of which most is expected, or the favourite if that is not surely better."""
    worth = {
        name: alternatives[name]["expected"] + preference(mixture[None])[0]
        for name, mixture in mixtures.items()
    }
    best = max(worth, key=worth.__getitem__)  # the first where several are the same mixture
    if favourite is None or favourite not in mixtures:
        return best
    pair = np.stack([mixtures[best], mixtures[favourite]])
    return best if is_surely_better(pair, posterior, preference, seed) else favourite


def _others(mixtures: Mapping[str, Array], names: Sequence[str], winner: Array) -> dict[str, Array]:
    """Return the named mixtures that are not the winner itself."""
    return {name: mixtures[name] for name in names if not is_same(mixtures[name], winner)}


def _best_observed(
    usable: Sequence[Trial], domains: Sequence[str], landscape: Landscape, preference: ExtraWorth
) -> Array:
    """Return the mixture of the design that measured most."""
    designed = [trial for trial in usable if not is_verification(trial)]
    mixtures = np.array([to_vector(trial.mixture, domains) for trial in designed])
    utility, scale = landscape.utility, landscape.scale
    observed = [utility.of_trial(trial.scores, scale).value for trial in designed]
    return np.asarray(mixtures[int(np.argmax(observed + preference(mixtures)))])


def _compare(
    wanted: Mapping[str, Array],
    usable: Sequence[Trial],
    domains: Sequence[str],
    landscape: Landscape,
    expect: Landscape,
) -> dict[str, dict[str, Any]]:
    """Return the numbers of every wanted mixture that was measured."""
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


def _notes_on_measuring(landscape: Landscape, trials: Sequence[Trial]) -> list[str]:
    """Say where noise decides the scale, and which surrogates cannot tell mixtures apart."""
    utility = landscape.utility
    counts = dict(zip(utility.capabilities, utility.weights, strict=True))
    return notes_on_scale(utility, trials) + [
        f"The surrogate of {capability} ranks left-out trials poorly (Spearman "
        f"{evidence['spearman']:.2f}): its optimum is hardly better than a guess."
        for capability, evidence in landscape.evidence.items()
        if counts[capability] > 0 and evidence["spearman"] < POOR_RANKING
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


def _notes_on_priors(
    priors: Mapping[str, Array], alternatives: Mapping[str, Mapping[str, Any]], sure: Uncertainty
) -> list[str]:
    notes = []
    for name in priors:
        probability = sure.better_than.get(name)
        if probability is None:
            notes.append(f"The recommended mixture is the {name} one.")
        elif probability < SURE:
            notes.append(
                f"The recommended mixture is better than {name} with a probability of only "
                f"{probability:.2f}{_measured_gain(alternatives.get(name))}."
            )
    return notes


def _measured_gain(alternative: Mapping[str, Any] | None) -> str:
    if alternative is None:
        return ""
    gain, stderr = alternative["gain"], alternative["gain_stderr"]
    error = "" if stderr is None else f" +- {stderr:.4g}"
    return f"; it measured {abs(gain):.4g}{error} {'more' if gain >= 0 else 'less'}"


def _notes_on_small_shares(mixture: Mapping[str, float]) -> list[str]:
    """Say where the mixture leaves what the study of rank fidelity covered."""
    small = [
        f"{name} {share:.3f}"
        for name, share in mixture.items()
        if share < SMALL_SHARE / len(mixture)
    ]
    if not small:
        return []
    return [
        f"Less than a fifth of an even share: {', '.join(small)}. Merges are too optimistic of "
        "mixtures that all but leave a domain out (rank correlation 0.78 over the whole simplex, "
        "0.92 away from its faces: docs/fidelity.md); domains.NAME.bounds keep a domain in."
    ]
