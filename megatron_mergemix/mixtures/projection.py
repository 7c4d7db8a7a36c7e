"""Nearest points: of a box cut by the simplex, and of what a least nonzero share leaves of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

TOLERANCE = 1e-9
"""Two shares closer than this are the same; sums and bounds are checked to within it."""


def onto_box(points: Array, low: Array, high: Array) -> Array:
    """Return the Euclidean projection of points ``(P, D)`` on the mixtures of a box.

    It is ``clip(x - t, low, high)`` for the one shift ``t`` that makes the sum 1. The sum is
    piecewise linear and decreasing in ``t`` with a kink where a coordinate meets a bound, so
    ``t`` is interpolated between two neighbouring kinks.

    Args:
        points: anything.
        low: ``(D,)``, or one row per point; with ``high`` they hold a mixture.
        high: like ``low``.
    """
    low, high = np.broadcast_to(low, points.shape), np.broadcast_to(high, points.shape)
    kinks = np.concatenate([points - high, points - low], axis=1)
    order = np.argsort(kinks, axis=1, kind="stable")
    kinks = np.take_along_axis(kinks, order, axis=1)
    # Before its first kink a coordinate is at its upper bound, behind its second at its lower.
    moving = np.cumsum(np.where(order < points.shape[1], 1, -1), axis=1)
    fallen = np.cumsum(moving[:, :-1] * np.diff(kinks, axis=1), axis=1)
    sums = high.sum(axis=1, keepdims=True) - np.pad(fallen, ((0, 0), (1, 0)))
    # The last kink whose sum is still >= 1 starts the segment.
    left = np.clip((sums >= 1).sum(axis=1) - 1, 0, kinks.shape[1] - 2)[:, None]
    start, end = (np.take_along_axis(kinks, left + step, axis=1) for step in (0, 1))
    above, below = (np.take_along_axis(sums, left + step, axis=1) for step in (0, 1))
    slope = np.where(above > below, above - below, 1.0)
    shift = start + (end - start) * np.clip((above - 1) / slope, 0, 1)
    return np.clip(points - shift, low, high)


def onto_supports(points: Array, low: Array, high: Array, floor: float) -> Array:
    """Return a near mixture within the bounds none of whose shares is between 0 and the floor.

    The domains that have a share at all are those with the largest coordinates, as many as bring
    the mixture nearest. It is the nearest of all where the domains have the same bounds. Where
    the largest coordinates leave no room, the domains with the largest bounds are taken.

    Args:
        points: anything, ``(P, D)``.
        low: ``(D,)``.
        high: ``(D,)``.
        floor: such that :func:`has_room`.
    """
    nearest, least = np.zeros_like(points), np.full(len(points), np.inf)
    for costs in (-points, np.broadcast_to(-high, points.shape)):
        rows = np.flatnonzero(np.isinf(least))
        lows, highs = _supports(costs[rows], low, high, floor)
        for size in range(lows.shape[1]):
            fits = _hold_one(lows[:, size], highs[:, size])
            at = rows[fits]
            mixtures = onto_box(points[at], lows[fits, size], highs[fits, size])
            distance = ((mixtures - points[at]) ** 2).sum(axis=1)
            nearer = distance < least[at]
            nearest[at[nearer]], least[at[nearer]] = mixtures[nearer], distance[nearer]
    return nearest


def has_room(low: Array, high: Array, floor: float) -> bool:
    """Return whether some mixture within the bounds has no share between 0 and the floor.

    Of any number of domains those with the largest bounds leave the most room, and all that need
    not have a share need the floor alike, so it is enough to try them in this order.
    """
    return bool(_hold_one(*_supports(-high[None], low, high, floor)).any())


def _supports(costs: Array, low: Array, high: Array, floor: float) -> tuple[Array, Array]:
    """Return boxes ``(P, D + 1, D)`` that respect the floor, of the cheapest 0, 1, ... D domains.

    Domains with a least share are in all of them. One that cannot reach the floor makes its box
    empty, so those come last.

    Args:
        costs: of having a share of a domain ``(P, D)``.
        low: ``(D,)``.
        high: ``(D,)``.
        floor: the least share of a domain that has one.
    """
    needed, usable = low > 0, high >= floor - TOLERANCE
    order = np.argsort(np.where(usable, costs, np.inf), axis=1, kind="stable")
    rank = np.argsort(order, axis=1, kind="stable")
    chosen = (rank[:, None, :] < np.arange(len(low) + 1)[:, None]) | needed
    lows = np.where(chosen, np.maximum(low, floor), 0.0)
    highs = np.where(chosen, np.where(usable, np.maximum(high, floor), -1.0), 0.0)
    return lows, highs


def _hold_one(lows: Array, highs: Array) -> NDArray[np.bool_]:
    """Return for each box ``(..., D)`` whether it holds a mixture."""
    not_too_much = lows.sum(axis=-1) <= 1 + TOLERANCE
    enough = highs.sum(axis=-1) >= 1 - TOLERANCE
    return not_too_much & enough & (lows <= highs).all(axis=-1)
