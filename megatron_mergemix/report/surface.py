"""What the trials say about all mixtures, at the places that a report draws.

Nothing is fitted in a way of its own: the surrogates, their draws and the question whether a
mixture is as good are those of the verdict (:mod:`megatron_mergemix.search.verdict`), from all
trials. Left-out predictions are those of the surrogates that proposed the candidates, which
verifying trials did not teach; their errors are what ``search/result.json`` has on record.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_mergemix.config import Config
from megatron_mergemix.errors import MergeMixError
from megatron_mergemix.experiment.strategy import expert_ensemble
from megatron_mergemix.mixtures import simplex
from megatron_mergemix.mixtures.simplex import Array, Bounds
from megatron_mergemix.report.gather import Run
from megatron_mergemix.search.calibration import measurements
from megatron_mergemix.search.first_share import teaching
from megatron_mergemix.search.landscape import Landscape
from megatron_mergemix.search.make import bounds_of
from megatron_mergemix.search.preference import Preference
from megatron_mergemix.search.purposes import is_verification
from megatron_mergemix.search.uncertainty import LEVEL, Posterior, chance_of_better
from megatron_mergemix.trials import Trial

NUM_DRAWS = 1000
STEPS_OF_LINE = 60
STEPS_OF_PLANE = 48
LEAST_OF_PLANE = 12
"""Mixtures within the bounds; fewer of them are no surface."""


@dataclass(frozen=True)
class Surface:
    """The learned utility around one mixture.

    Attributes:
        optimum: the learned mixture, or, before the search is over, the best measured one ``(D,)``.
        bounds: of all mixtures that count as possible.
        searched: what proposed the candidates; has the left-out predictions.
        learned: what all trials teach.
        posterior: draws the utility.
        preference: decides comparisons together with the utility.
        points: mixtures of the trials ``(N, D)``.
        measured: their utilities ``(N,)``.
    """

    optimum: Array
    bounds: Bounds
    searched: Landscape
    learned: Landscape
    posterior: Posterior
    preference: Preference
    points: Array
    measured: Array


@dataclass(frozen=True)
class Line:
    """The utility as one domain's share moves and the others keep their proportions.

    Attributes:
        domain: its place.
        shares: of that domain ``(P,)``, within the bounds.
        mean: expected utility ``(P,)``.
        low: of the central interval ``(P,)``.
        high: of the central interval ``(P,)``.
        chance: that the optimum is better ``(P,)``.
        distances: of the trials from the line, half the L1 distance: the share of tokens that
            would have to change ``(N,)``.
    """

    domain: int
    shares: Array
    mean: Array
    low: Array
    high: Array
    chance: Array
    distances: Array


@dataclass(frozen=True)
class Plane:
    """The utility as three domains trade shares and the others stay at the optimum's.

    Attributes:
        domains: their places.
        rest: share of the others together.
        corners: shares of the three within what they have together ``(P, 3)``.
        mean: expected utility ``(P,)``.
        chance: that the optimum is better ``(P,)``.
        allowed: whether the bounds allow the mixture ``(P,)``.
        trials: the trials' shares within the three ``(N, 3)``; NaN where they have none of them.
        distances: of the trials from the plane ``(N,)``, as those of a line.
    """

    domains: tuple[int, int, int]
    rest: float
    corners: Array
    mean: Array
    chance: Array
    allowed: NDArray[np.bool_]
    trials: Array
    distances: Array


def surface_of(run: Run) -> Surface | str:
    """Return the learned surface, or why there is none."""
    if run.scale is None:
        return "too few trials are measured to learn a surface."
    try:
        return _fit(run)
    except MergeMixError as error:
        return str(error)


def _fit(run: Run) -> Surface | str:
    config, domains = run.config, run.domains
    assert run.scale is not None
    tokens = run.tokens
    if tokens is None and _needs_tokens(config):
        return (
            "it depends on the tokens of the domains (domains.<name>.max_epochs, or search.kl with "
            "a proportional prior), and those are not known here."
        )
    proportional = (
        simplex.uniform(len(domains)) if tokens is None else simplex.proportional(tokens, domains)
    )
    bounds = bounds_of(config, tokens)
    trials, usable = run.scored, teaching(run.trials, domains, bounds)
    ensemble = expert_ensemble(config) if config.search.ensemble else None
    surrogate = "auto" if config.search.hierarchy else config.search.surrogate
    searched = Landscape(explored(run), domains, run.utility, run.scale, surrogate, ensemble)
    whole = [trial for trial in usable if trial.first is None]
    if not whole:
        return "no trial on all items is within the bounds."
    learned = searched.learned_from(usable, domains)
    points = np.array([simplex.to_vector(trial.mixture, domains) for trial in trials])
    measured = run.utility.combine(measurements(trials, run.utility)[0], run.scale)
    optimum = points[int(np.argmax(measured))]
    if run.result is not None:
        optimum = simplex.to_vector(run.result["mixture"], domains)
    return Surface(
        optimum,
        bounds,
        searched,
        learned,
        Posterior(learned, whole, domains),
        Preference(config.search, domains, proportional),
        points,
        measured,
    )


def _needs_tokens(config: Config) -> bool:
    is_near_data = config.search.kl > 0 and config.search.prior == "proportional"
    return is_near_data or any(domain.max_epochs for domain in config.domains.values())


def explored(run: Run) -> list[Trial]:
    """Return the trials that the candidates were proposed from."""
    is_flat = run.config.search.hierarchy is None  # else each stage's are the next one's design
    return [trial for trial in run.teaching() if not (is_flat and is_verification(trial))]


def line(surface: Surface, domain: int) -> Line:
    """Return the utility along the line through the optimum and the corner of a domain."""
    optimum = surface.optimum
    rest = np.delete(optimum, domain)
    total = rest.sum()
    others = rest / total if total > 1e-9 else simplex.uniform(len(rest))
    here = float(optimum[domain])
    shares = np.unique(np.append(np.linspace(0.0, 1.0, STEPS_OF_LINE + 1), here))
    points = np.insert(np.outer(1.0 - shares, others), domain, shares, axis=1)
    allowed = simplex.within(points, surface.bounds) | (shares == here)
    shares, points = shares[allowed], points[allowed]
    rng = np.random.default_rng([0, domain])
    draws = surface.posterior.sample(points, NUM_DRAWS, rng)
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(draws, [tail, 100 - tail], axis=0)
    chance = chance_of_better(optimum, points, surface.posterior, surface.preference, rng)
    at = surface.points[:, domain]
    nearest = np.insert(np.outer(1.0 - at, others), domain, at, axis=1)
    distances = np.abs(surface.points - nearest).sum(axis=1) / 2
    return Line(domain, shares, surface.learned(points), low, high, chance, distances)


def plane(surface: Surface) -> Plane | None:
    """Return the utility over the three largest domains.

    None where there are but two, or where the bounds leave next to nothing of the plane.
    """
    optimum = surface.optimum
    if len(optimum) < 3:
        return None
    places = sorted(np.argsort(-optimum, kind="stable")[:3].tolist())
    total = float(optimum[places].sum())
    corners = simplex.lattice(3, STEPS_OF_PLANE)
    points = np.repeat(optimum[None], len(corners), axis=0)
    points[:, places] = total * corners
    allowed = simplex.within(points, surface.bounds)
    if allowed.sum() < LEAST_OF_PLANE or not _has_area(corners[allowed]):
        return None
    rng = np.random.default_rng(0)
    chance = chance_of_better(optimum, points, surface.posterior, surface.preference, rng)
    sums = surface.points[:, places].sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        trials = np.where(sums[:, None] > 1e-9, surface.points[:, places] / sums[:, None], np.nan)
    nearest = np.repeat(optimum[None], len(trials), axis=0)
    nearest[:, places] = total * np.nan_to_num(trials)
    distances = np.abs(surface.points - nearest).sum(axis=1) / 2
    first, second, third = places
    return Plane(
        (first, second, third),
        1.0 - total,
        corners,
        surface.learned(points),
        chance,
        allowed,
        trials,
        distances,
    )


def _has_area(points: Array) -> bool:
    """Return whether any triangle of the lattice has all its corners among these points of it."""
    cells = {tuple(cell) for cell in np.rint(STEPS_OF_PLANE * points).astype(int).tolist()}
    return any(
        {(i + step, j - step, k), (i + step, j, k - step)} <= cells
        for i, j, k in cells
        for step in (1, -1)
    )


@dataclass(frozen=True)
class LeftOut:
    """What surrogates predict of trials that they did not see.

    Attributes:
        name: a capability, or ``utility``.
        unit: of the numbers.
        measured: ``(N,)``, in the sign of the unit.
        predicted: ``(N,)``.
        surrogate: its name; empty for the utility, which combines them.
    """

    name: str
    unit: str
    measured: Array
    predicted: Array
    surrogate: str


def left_out(run: Run, surface: Surface) -> list[LeftOut]:
    """Return the utility first, then every capability."""
    trials = explored(run)
    values, _ = measurements(trials, run.utility)
    predicted = surface.searched.left_out()
    assert run.scale is not None
    found = [
        LeftOut(
            "utility",
            "utility",
            run.utility.combine(values, run.scale),
            run.utility.combine(predicted, run.scale),
            "",
        )
    ]
    for place, (name, metrics) in enumerate(run.utility.objective.items()):
        score = trials[0].scores[name][metrics[0]]
        sign = 1.0 if score.higher_is_better else -1.0
        found.append(
            LeftOut(
                name,
                score.unit,
                sign * values[:, place],
                sign * predicted[:, place],
                surface.searched.evidence[name]["surrogate"],
            )
        )
    return found
