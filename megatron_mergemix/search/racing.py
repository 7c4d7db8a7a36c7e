"""Which candidates of a search still can win, and are worth the rest of the items.

With ``search.first_share`` a candidate is scored on a share of the items at first. Surrogates that
learned all trials so far tell how good each may be: in joint draws of their posterior a candidate
is compared with the one of which most is expected, so that errors which both share cancel. It can
win for as long as its utility is higher in at least :data:`CHANCE` of the draws. This is the race
of Maron and Moore (Hoeffding races, 1994), with the surface in place of independent bounds: what a
neighbour scored counts too.

The race goes in waves. The most promising ones get the rest of their items first, and what they
score then decides about the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from megatron_mergemix.journal import Trial
from megatron_mergemix.search.first_share import on_all_items
from megatron_mergemix.search.landscape import Landscape
from megatron_mergemix.search.strategy import Proposal
from megatron_mergemix.search.uncertainty import Preference
from megatron_mergemix.simplex import Array, to_vector

CHANCE = 0.05
"""Least probability to be better than the best, for a candidate that still can win."""

KEPT = 0.1
"""Part of the candidates that get the rest of their items in any case, the most promising ones:
they tell how the first items differ from the others where it matters."""

WAVE = 0.2
"""Part of the candidates that get the rest of their items at a time."""

NUM_DRAWS = 2000


def next_wave(
    explored: Sequence[Trial],
    raced: Sequence[Proposal],
    learn: Callable[[Sequence[Trial]], Landscape],
    domains: Sequence[str],
    preference: Preference,
    seed: int,
) -> list[Trial]:
    """Return the trials on a first share that get the rest of the items next; none ends the race.

    Deterministic: a function of what it is told.

    Args:
        explored: the successful trials of mixtures so far.
        raced: who got the rest of the items, or failed to.
        learn: returns what trials teach that are all as on all items.
        domains: their order is the order of all vectors.
        preference: decides comparisons together with the utility.
        seed: of the draws.
    """
    begun = {trial.index: trial for trial in explored if trial.first is not None}
    tried = {tuple(proposal.mixture.values()) for proposal in raced}
    trials = sorted(on_all_items(explored), key=lambda trial: trial.index)
    points = np.array([to_vector(trial.mixture, domains) for trial in trials])
    chances = chances_to_win(learn(trials), points, preference, seed)
    left = [
        place
        for place in np.argsort(-chances, kind="stable")
        if trials[place].first is not None and tuple(trials[place].mixture.values()) not in tried
    ]
    wanted = sum(chances[place] >= CHANCE for place in left)
    wanted = max(wanted, math.ceil(KEPT * len(begun)) - len(raced))
    size = min(wanted, math.ceil(WAVE * len(begun)))
    return [begun[trials[place].index] for place in left[: max(size, 0)]]


def measured_wave(trials: Mapping[int, Trial], first: int, number: int) -> list[Proposal]:
    """Return the wave as a journal has it, as far as it has it.

    Args:
        trials: by index.
        first: index of its first trial.
        number: of the wave, from 1.
    """
    there: list[Proposal] = []
    while (trial := trials.get(first + len(there))) and trial.purpose == f"race:{number}":
        there.append(Proposal(trial.index, trial.purpose, dict(trial.mixture)))
    return there


def wave_of(purpose: str) -> int:
    """Return the number of the wave that a purpose ``race:<number>`` names."""
    return int(purpose.rpartition(":")[2])


def chances_to_win(landscape: Landscape, points: Array, preference: Preference, seed: int) -> Array:
    """Return with which probability mixtures ``(P, D)`` are at least as good as the best ``(P,)``.

    The best is the one of which most is expected.
    """
    values = landscape.sample(points, NUM_DRAWS, np.random.default_rng([seed, 13]))
    draws = landscape.utility.combine(values, landscape.scale) + preference(points)
    best = int(np.argmax(draws.mean(axis=0)))
    return np.asarray((draws >= draws[:, best : best + 1]).mean(axis=0))
