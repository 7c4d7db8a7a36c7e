"""Which candidates of a search still matter, and are worth the rest of the items.

With ``search.first_share`` a candidate is scored on a share of the items at first. Surrogates that
learned all trials so far then tell, by joint draws of their posterior, in which errors that two
mixtures share cancel,

- who still can win: its utility is at least that of the candidate of which most is expected in
  :data:`CHANCE` of the draws. This is the race of Maron and Moore (Hoeffding races, 1994), with the
  surface in place of independent bounds: what a neighbour scored counts too.
- who tells most of where the optimum is. What is recommended is no candidate but the optimum of
  the surface that they lie on, and one far away may say more of it than one close by.

The first get the rest of their items before the second, all in waves, each of which learns from
those before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from megatron_mergemix.mixtures.simplex import Array, Bounds, dense_points, to_vector
from megatron_mergemix.search.first_share import on_all_items
from megatron_mergemix.search.landscape import Landscape
from megatron_mergemix.search.strategy import Proposal
from megatron_mergemix.search.uncertainty import ExtraWorth
from megatron_mergemix.trials import Trial

CHANCE = 0.05
"""Least probability to be better than the best, for a candidate that still can win."""

KEPT = 0.35
"""Part of the candidates that get the rest of their items, those that can win among them."""

WAVE = 0.2
"""Part of the candidates that get the rest of their items at a time."""

NUM_DRAWS = 2000
NUM_DENSE, NUM_POOL = 4000, 150
"""Mixtures that are looked at, and those of them that may be the optimum."""


def next_wave(
    explored: Sequence[Trial],
    raced: Sequence[Proposal],
    learn: Callable[[Sequence[Trial]], Landscape],
    domains: Sequence[str],
    bounds: Bounds,
    preference: ExtraWorth,
    seed: int,
) -> list[Trial]:
    """Return the trials on a first share that get the rest of the items next; none ends the race.

    Deterministic: a function of what it is told.

    Args:
        explored: the successful trials of mixtures so far.
        raced: who got the rest of the items, or failed to.
        learn: returns what trials teach that are all as on all items.
        domains: their order is the order of all vectors.
        bounds: of all mixtures.
        preference: decides comparisons together with the utility.
        seed: of the draws.
    """
    begun = {trial.index: trial for trial in explored if trial.first is not None}
    tried = {tuple(proposal.mixture.values()) for proposal in raced}
    trials = sorted(on_all_items(explored), key=lambda trial: trial.index)
    left = [
        place
        for place, trial in enumerate(trials)
        if trial.first is not None and tuple(trial.mixture.values()) not in tried
    ]
    if not left:
        return []
    landscape = learn(trials)
    points = np.array([to_vector(trial.mixture, domains) for trial in trials])
    chances = chances_to_win(landscape, points, preference, seed)
    errors = [landscape.utility.of_trial(trial.scores, landscape.scale).stderr for trial in trials]
    noise = np.array([0.0 if error is None else error for error in errors]) ** 2
    told = told_of_optimum(landscape, points, noise, bounds, preference, seed)
    left.sort(key=lambda place: (chances[place] < CHANCE, -told[place]))
    wanted = sum(chances[place] >= CHANCE for place in left)
    wanted = max(wanted, math.ceil(KEPT * len(begun)) - len(raced))
    size = min(wanted, math.ceil(WAVE * len(begun)))
    return [begun[trials[place].index] for place in left[: max(size, 0)]]


def told_of_optimum(
    landscape: Landscape,
    points: Array,
    noise: Array,
    bounds: Bounds,
    preference: ExtraWorth,
    seed: int,
) -> Array:
    """Return how much a measurement of each mixture ``(P, D)`` tells of where the optimum is.

    By how much it is expected to lower the variance of the differences between the mixtures that
    may be the optimum, each weighted with the probability that it is: ``(P,)``.

    Args:
        landscape: what is known.
        points: the mixtures.
        noise: variance of the utility that would be measured there ``(P,)``.
        bounds: of all mixtures.
        preference: decides comparisons together with the utility.
        seed: of the draws.
    """
    rng = np.random.default_rng([seed, 15])
    dense = dense_points(bounds, rng, NUM_DENSE)
    highest = landscape.optimistic(dense, 2.0) + preference(dense)
    pool = dense[np.argsort(-highest, kind="stable")[:NUM_POOL]]
    both = np.concatenate([points, pool])
    values = landscape.sample(both, NUM_DRAWS, rng)
    draws = landscape.utility.combine(values, landscape.scale) + preference(both)
    of_points, of_pool = draws[:, : len(points)], draws[:, len(points) :]
    best, wins = np.argmax(of_pool.mean(axis=0)), np.argmax(of_pool, axis=1)
    likely = np.bincount(wins, minlength=len(pool)) / len(wins)
    differences = of_pool - of_pool[:, best : best + 1]
    spread = of_points - of_points.mean(axis=0)
    covariance = spread.T @ (differences - differences.mean(axis=0)) / len(draws)
    return np.asarray(covariance**2 @ likely / (spread.var(axis=0) + noise + 1e-300))


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


def chances_to_win(landscape: Landscape, points: Array, preference: ExtraWorth, seed: int) -> Array:
    """Return with which probability mixtures ``(P, D)`` are at least as good as the best ``(P,)``.

    The best is the one of which most is expected.
    """
    values = landscape.sample(points, NUM_DRAWS, np.random.default_rng([seed, 13]))
    draws = landscape.utility.combine(values, landscape.scale) + preference(points)
    best = int(np.argmax(draws.mean(axis=0)))
    return np.asarray((draws >= draws[:, best : best + 1]).mean(axis=0))
