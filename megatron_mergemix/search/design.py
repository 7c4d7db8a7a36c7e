"""The first trials: where a search looks before it has measured anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from megatron_mergemix.errors import ConfigError
from megatron_mergemix.mixtures.simplex import (
    TOLERANCE,
    Array,
    Bounds,
    bounded_lattice,
    corners,
    lattice_size,
    project,
    sample_dirichlet,
    sample_uniform,
    uniform,
)
from megatron_mergemix.mixtures.space_filling import NUM_CANDIDATES, farthest_points
from megatron_mergemix.search.purposes import is_anchor, is_verifying
from megatron_mergemix.search.strategy import Proposal
from megatron_mergemix.trials import Trial


def design(
    bounds: Bounds, proportional: Array, num: int, seed: int, setting: str = "search.trials"
) -> list[tuple[str, Array]]:
    """Return exactly ``num`` distinct mixtures within the bounds, each with its purpose.

    In this order: the vertices (pure domains, or what the bounds leave nearest to them, see
    :func:`anchors`), the priors a person would try (uniform, proportional to tokens), the finest
    lattice that fits, and points as far as possible from all others. The paper (arXiv 2601.17858,
    section 3.2) says "coarse grid search combined with heuristic priors"; 4 domains and 40 trials
    give the 35 points of the lattice with step 1/4, the proportional mixture and 4 filling points.

    Args:
        bounds: of the mixtures.
        proportional: the mixture proportional to tokens.
        num: of mixtures.
        seed: of the filling points.
        setting: what ``num`` comes from, for messages.

    Raises:
        ConfigError: ``num`` does not hold the vertices and priors, or the bounds leave no room
            for that many distinct mixtures.
    """
    chosen = start(bounds, proportional, num, setting)
    chosen = _distinct(chosen + [("lattice", point) for point in _lattice(chosen, bounds, num)])
    return chosen + [("fill", point) for point in _fill(chosen, bounds, num, seed, setting)]


def spread(bounds: Bounds, proportional: Array, num: int, seed: int) -> list[tuple[str, Array]]:
    """Return ``num`` distinct mixtures: vertices, priors, the middle of the rest.

    For searches that choose most mixtures later: no lattice, which would take most trials.

    Raises:
        ConfigError: as :func:`design`.
    """
    chosen = start(bounds, proportional, num)
    return chosen + [("fill", point) for point in _fill(chosen, bounds, num, seed, "search.trials")]


def grid(bounds: Bounds, proportional: Array, num: int) -> list[tuple[str, Array]]:
    """Return the vertices, the priors and the finest lattice, at most ``num`` mixtures together.

    Raises:
        ConfigError: as :func:`design`.
    """
    chosen = start(bounds, proportional, num)
    return _distinct(chosen + [("lattice", point) for point in _lattice(chosen, bounds, num)])


def listed(
    bounds: Bounds, proportional: Array, points: Sequence[tuple[str, Array]]
) -> list[tuple[str, Array]]:
    """Return the vertices, the priors and given mixtures with their purposes."""
    return _distinct([*_named(bounds, proportional), *points])


def start(
    bounds: Bounds, proportional: Array, num: int, setting: str = "search.trials"
) -> list[tuple[str, Array]]:
    """Return the vertices and the priors a person would try.

    Raises:
        ConfigError: they are more than ``num``.
    """
    chosen = _distinct(_named(bounds, proportional))
    if len(chosen) > num:
        raise ConfigError(
            f"{setting} is {num}; expected at least {len(chosen)}, for every domain alone and "
            "the uniform and the proportional mixture."
        )
    return chosen


def anchors(nearest: Array, priors: Sequence[tuple[str, Array]]) -> list[tuple[str, Array]]:
    """Return the mixtures nearest to every domain alone, then the priors, with their purposes.

    A ``corner`` is one that bounds keep so far from its domain that another has more: it says
    nothing of that domain alone, so it does not tell what 0 and 1 of the utility mean. One that is
    a prior is called that. Where no two domains can be nearly alone, all are vertices.

    Args:
        nearest: ``(D, D)``.
        priors: mixtures with their purposes.
    """
    is_vertex = np.diagonal(nearest) >= nearest.max(axis=1) - TOLERANCE
    if is_vertex.sum() < 2:
        is_vertex = np.ones(len(nearest), dtype=np.bool_)

    def purpose_of(point: Array) -> str:
        same = (p for p, prior in priors if np.abs(point - prior).max() <= TOLERANCE)
        return next(same, "corner")

    named = zip(is_vertex, nearest, strict=True)
    return [*(("vertex" if own else purpose_of(p), p) for own, p in named), *priors]


def failed_anchors(planned: Sequence[Proposal], trials: Mapping[int, Trial]) -> list[Proposal]:
    """Return the anchors among measured proposals that failed, to be asked once more behind them.

    Args:
        planned: numbered from 0 on, all of them measured.
        trials: index -> trial.
    """
    anchors = (p for p in planned if is_anchor(p.purpose) and not is_verifying(p.purpose))
    failed = (proposal for proposal in anchors if trials[proposal.index].error)
    return [replace(proposal, index=n) for n, proposal in enumerate(failed, len(planned))]


def _named(bounds: Bounds, proportional: Array) -> list[tuple[str, Array]]:
    priors = [
        ("prior:uniform", project(uniform(len(bounds.low)), bounds)),
        ("prior:proportional", project(proportional, bounds)),
    ]
    return anchors(corners(bounds), priors)


def _distinct(named: list[tuple[str, Array]]) -> list[tuple[str, Array]]:
    """Return the points without repetitions; the first purpose stays."""
    points = np.array([point for _, point in named])
    same = np.abs(points[:, None, :] - points[None, :, :]).max(axis=2) <= TOLERANCE
    repeats = np.tril(same, k=-1).any(axis=1)
    return [pair for pair, repeat in zip(named, repeats, strict=True) if not repeat]


def _lattice(chosen: list[tuple[str, Array]], bounds: Bounds, num: int) -> Array:
    """Return the finest lattice that fits into ``num`` points together with the chosen ones."""
    best = bounded_lattice(bounds, 1)
    steps = 2
    # Bounds may leave few of many lattice points, so finer ones are tried well beyond num.
    while steps <= 100 and lattice_size(len(bounds.low), steps) <= 100 * num:
        points = bounded_lattice(bounds, steps)
        if len(points) <= num and len(_distinct(chosen + [("", p) for p in points])) <= num:
            best = points
        steps += 1
    return best


def _fill(
    chosen: list[tuple[str, Array]], bounds: Bounds, num: int, seed: int, setting: str
) -> list[Array]:
    """Return what is missing to ``num`` points, each the farthest from all before (maximin)."""
    rng = np.random.default_rng([seed, 1])
    sparse = sample_dirichlet(np.full(len(bounds.low), 0.5), NUM_CANDIDATES // 2, rng)
    spread = sample_uniform(bounds, NUM_CANDIDATES - len(sparse), rng)
    candidates = np.concatenate([project(sparse, bounds), spread])
    taken = np.array([point for _, point in chosen])
    filled = farthest_points(candidates, taken, num - len(taken))
    if len(taken) + len(filled) < num:
        limits = "domains.*.bounds" + (" and search.min_share" if bounds.floor else "")
        raise ConfigError(
            f"{limits} leave room for {len(taken) + len(filled)} distinct mixtures, {setting} asks "
            f"for {num}. Give them more room."
        )
    return filled
