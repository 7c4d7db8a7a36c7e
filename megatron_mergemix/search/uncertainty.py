"""How sure the recommendation is: an interval, probabilities, and what is as good within noise.

Everything is read off joint draws of the utility: surrogates that learned every trial are
drawn per capability, what other items would have scored is added where it is known (see
:mod:`megatron_mergemix.search.other_items`), and the utility combines each draw. So errors that
two mixtures share cancel in their comparison, and ``worst`` needs no formula of its own. A
posterior needs no correction for having picked the best of many: it does not believe the luck of
a trial in the first place.

What the utility means: its value on new items of the same kind where the trials kept their
items. Where an evaluator gives standard errors alone, nobody can tell what in them all trials
share, and the utility is meant on the items of the search. The scale of the utility is taken as
exact, and the merged model as the model: how far a really trained one may lie from it is for
``validate``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from megatron_mergemix.mixtures.simplex import (
    Array,
    Bounds,
    corners,
    project,
    sample_uniform,
    to_mixture,
)
from megatron_mergemix.search.landscape import Landscape
from megatron_mergemix.search.other_items import OtherItems
from megatron_mergemix.trials import Trial

SURE = 0.95
"""Probability at which one mixture counts as better than another."""

LEVEL = 0.95
"""Of the central interval."""

NUM_DRAWS, NUM_DENSE_DRAWS = 4000, 1000
NUM_UNIFORM = 1000
"""Mixtures that estimate the share of those that are as good."""

NEAREST = 0.003
"""Least part of a line from the winner that is looked at."""

CHUNK = 100
"""Mixtures that are drawn together; the cost grows with its square."""

ExtraWorth = Callable[[Array], Array]
"""Mixtures ``(P, D)`` -> what is added to their utility ``(P,)`` wherever they are compared."""


def no_preference(points: Array) -> Array:
    """Return zeros: mixtures are compared by their utility alone."""
    return np.zeros(len(points))


class Uncertainty(NamedTuple):
    """Fields of :class:`~megatron_mergemix.search.strategy.Recommendation` of the same names."""

    interval: tuple[float, float]
    better_than: dict[str, float]
    as_good: dict[str, Any]
    items: str


class Posterior:
    """Joint draws of the utility of mixtures, in the light of all trials.

    Args:
        landscape: learned from ``trials``.
        trials: successful trials of mixtures.
        domains: their order is the order of all vectors.
    """

    def __init__(
        self, landscape: Landscape, trials: Sequence[Trial], domains: Sequence[str]
    ) -> None:
        self._landscape = landscape
        self._other_items = OtherItems(trials, domains, landscape.utility)

    @property
    def items(self) -> str:
        """Return what the utility is meant on: ``"new items"``, or ``"the search's items"``.

        The latter also where only some of the capabilities that count kept theirs.
        """
        utility = self._landscape.utility
        counted = [
            n for n, weight in zip(utility.capabilities, utility.weights, strict=True) if weight
        ]
        known = set(self._other_items.known)
        return "new items" if known.issuperset(counted) else "the search's items"

    def sample(self, points: Array, num: int, rng: np.random.Generator) -> Array:
        """Return ``num`` joint draws ``(num, P)`` of the utility of mixtures ``(P, D)``."""
        values = self._landscape.sample(points, num, rng)
        values += self._other_items.sample(points, num, rng)
        return self._landscape.utility.combine(values, self._landscape.scale)


def how_sure(
    winner: Array,
    rivals: Mapping[str, Array],
    goals: Mapping[str, Array],
    domains: Sequence[str],
    bounds: Bounds,
    posterior: Posterior,
    preference: ExtraWorth = no_preference,
    seed: int = 0,
) -> Uncertainty:
    """Return how sure it is that ``winner`` is the best mixture.

    Args:
        winner: the recommended mixture ``(D,)``.
        rivals: name -> another mixture that it may beat.
        goals: name -> mixture within the bounds that a practical one should be near to.
        domains: names of the entries.
        bounds: of all mixtures that count as possible.
        posterior: draws the utility.
        preference: decides comparisons together with the utility; the interval is without it.
        seed: of the draws.
    """
    rng = np.random.default_rng([seed, 4])
    named = np.stack([winner, *rivals.values()])
    draws = posterior.sample(named, NUM_DRAWS, rng)
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(draws[:, 0], [tail, 100 - tail])
    better = _probability_of_first(draws + preference(named))[1:]
    return Uncertainty(
        interval=(float(low), float(high)),
        better_than={name: float(p) for name, p in zip(rivals, better, strict=True)},
        as_good=_as_good(winner, goals, domains, bounds, posterior, preference, rng),
        items=posterior.items,
    )


def is_surely_better(
    mixtures: Array, posterior: Posterior, preference: ExtraWorth, seed: int
) -> bool:
    """Return whether the first of two mixtures ``(2, D)`` is better with a probability of SURE."""
    draws = posterior.sample(mixtures, NUM_DRAWS, np.random.default_rng([seed, 5]))
    return bool(_probability_of_first(draws + preference(mixtures))[1] >= SURE)


def _probability_of_first(draws: Array) -> Array:
    """Return for draws ``(num, P)`` how often the first column exceeds each column ``(P,)``."""
    return np.asarray((draws[:, :1] > draws).mean(axis=0))


def chance_of_better(
    winner: Array,
    points: Array,
    posterior: Posterior,
    preference: ExtraWorth,
    rng: np.random.Generator,
) -> Array:
    """Return the probability ``(P,)`` that the winner is better than each of many mixtures.

    Below :data:`SURE` a mixture is as good as the winner, as far as anybody can tell.

    Args:
        winner: ``(D,)``.
        points: ``(P, D)``.
        posterior: draws the utility.
        preference: decides comparisons together with the utility.
        rng: of the draws.
    """
    return np.concatenate(
        [
            _probability_of_first(
                posterior.sample(chunk, NUM_DENSE_DRAWS, rng) + preference(chunk)
            )[1:]
            for part in np.split(points, range(CHUNK, len(points), CHUNK))
            for chunk in [np.concatenate([winner[None], part])]
        ]
    )


def _as_good(
    winner: Array,
    goals: Mapping[str, Array],
    domains: Sequence[str],
    bounds: Bounds,
    posterior: Posterior,
    preference: ExtraWorth,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Return the mixtures that the winner is not surely better than."""
    spread = sample_uniform(bounds, NUM_UNIFORM, rng)
    points = np.concatenate([spread, _around(winner, goals, bounds, spread, rng)])
    good = chance_of_better(winner, points, posterior, preference, rng) < SURE
    among = np.concatenate([winner[None], points[good]])
    return {
        "share": float(good[: len(spread)].mean()),
        "least": to_mixture(among.min(axis=0), domains),
        "largest": to_mixture(among.max(axis=0), domains),
        "nearest": {
            name: to_mixture(among[np.argmin(np.abs(among - goal).sum(axis=1))], domains)
            for name, goal in goals.items()
        },
    }


def _around(
    winner: Array,
    goals: Mapping[str, Array],
    bounds: Bounds,
    spread: Array,
    rng: np.random.Generator,
) -> Array:
    """Return mixtures on lines from the winner, denser near it, where spread ones are too rare.

    To every corner, away from it as far as the bounds allow, to the goals, and a random part of
    the way to the evenly spread mixtures. Without a floor the region is convex, so all of them
    lie within the bounds; with one they are moved there.
    """
    ends = [*corners(bounds), *goals.values()]
    for corner in corners(bounds):
        away = winner - corner
        limits = np.where(away > 0, bounds.high - winner, bounds.low - winner)
        moving = np.abs(away) > 1e-12
        if moving.any():
            ends.append(winner + away * max(0.0, float((limits[moving] / away[moving]).min())))
    steps = np.geomspace(NEAREST, 1.0, 24)
    lines = winner + steps[:, None, None] * (np.array(ends) - winner)
    part = NEAREST ** rng.random((len(spread) // 2, 1))
    inner = winner + part * (spread[: len(part)] - winner)
    return project(np.concatenate([lines.reshape(-1, len(winner)), inner]), bounds)
