"""Mixtures on two levels: domains in groups, with bounds on both.

The mixtures within all bounds are a polytope: every domain has a box, every group a box for its
total, and everything sums to one. A stage of a hierarchical search moves in a part of it, a
:class:`Frame`: the totals of the groups, or the mixture inside one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_mergemix.errors import ConfigError
from megatron_mergemix.mixtures.simplex import TOLERANCE, Array, Bounds, project, within

Places = NDArray[np.intp]

_HALVINGS = 60
"""Of an interval of length 3, which leaves less than the last bit of a share."""


class Levels:
    """Which domains form which group, and what bounds leave of their mixtures.

    Args:
        groups: group -> its domains; a domain stands in exactly one.
        domains: their order is the order of all vectors.
        bounds: least and largest share of every domain.
        group_bounds: of the groups that have some.

    Attributes:
        members: group -> places of its domains.
        totals: least and largest total of every group that its own bounds and those of its
            domains leave.
        are_bounded: whether a group has bounds that its domains do not have anyhow.

    Raises:
        ConfigError: no mixture is within all bounds.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[str]],
        domains: Sequence[str],
        bounds: Bounds,
        group_bounds: Mapping[str, tuple[float, float]],
    ) -> None:
        self.domains, self.bounds = tuple(domains), bounds
        places = {name: place for place, name in enumerate(domains)}
        self.members = {
            group: np.array([places[name] for name in names]) for group, names in groups.items()
        }
        limits = []
        self.are_bounded = False
        for group, members in self.members.items():
            least, largest = group_bounds.get(group, (0.0, 1.0))
            low, high = float(bounds.low[members].sum()), float(bounds.high[members].sum())
            self.are_bounded |= least > low or largest < min(high, 1.0)
            low, high = max(least, low), min(largest, high, 1.0)
            if low > high + TOLERANCE:
                raise ConfigError(
                    f"domains.{group}: the least share of the group is {low:.6g} and the largest "
                    f"{high:.6g} (bounds of the group and of its children, max_epochs); no mixture "
                    "fits."
                )
            limits.append((low, max(low, high)))
        self.totals = Bounds(*np.array(limits).T)
        if self.totals.low.sum() > 1 + TOLERANCE or self.totals.high.sum() < 1 - TOLERANCE:
            raise ConfigError(
                f"The bounds of the groups leave least shares that sum to "
                f"{self.totals.low.sum():.6g} and largest shares that sum to "
                f"{self.totals.high.sum():.6g}; no mixture has a sum of 1. Change bounds or "
                "max_epochs."
            )

    def totals_of(self, points: Array) -> Array:
        """Return the share of every group ``(..., G)`` of mixtures ``(..., D)``."""
        return np.stack([points[..., m].sum(axis=-1) for m in self.members.values()], axis=-1)

    def hold(self, points: Array) -> NDArray[np.bool_]:
        """Return for each point ``(..., D)`` whether it is a mixture within all bounds."""
        return within(points, self.bounds) & within(self.totals_of(points), self.totals)

    def compose(self, totals: Array, inside: Array) -> Array:
        """Return the mixture ``(D,)`` of these group shares and these mixtures inside.

        Where a bound of a domain forbids its part, the nearest mixture inside that is allowed.

        Args:
            totals: ``(G,)``, each within what the group can have.
            inside: ``(D,)``, the shares of every group's domains among themselves, in proportion.
        """
        point = np.zeros(len(self.domains))
        for total, members in zip(totals, self.members.values(), strict=True):
            wanted = total * inside[members] / inside[members].sum()
            point[members] = _nearest_with_sum(wanted, self._bounds_of(members), total)
        return point

    def inner_bounds(self, members: Places, total: float) -> Bounds:
        """Return the bounds of domains among themselves when together they have ``total``."""
        low, high, _ = self._bounds_of(members)
        return Bounds(np.minimum(low / total, 1.0), np.minimum(high / total, 1.0))

    def _bounds_of(self, members: Places) -> Bounds:
        return Bounds(self.bounds.low[members], self.bounds.high[members])

    def project(self, points: Array) -> Array:
        """Return the nearest mixture within all bounds for each point ``(..., D)``.

        The Lagrangian of the problem shifts every share by ``t``, and those of a group whose total
        meets a bound by a multiplier of its own. So a group gets the total of its shifted and
        clipped shares, itself clipped; the sum of these falls with ``t``, which is bisected; and
        inside a group the nearest shares with that total are taken. A point that is within the
        bounds already keeps its bits.
        """

        nearest = points.copy()
        outside = ~self.hold(points)
        if outside.any():
            nearest[outside] = self._project(points[outside])
        return nearest

    def _project(self, points: Array) -> Array:
        """Return the nearest mixtures of points ``(P, D)``."""

        def totals_at(shift: Array) -> Array:
            shifted = np.clip(points - shift[:, None], self.bounds.low, self.bounds.high)
            return np.clip(self.totals_of(shifted), self.totals.low, self.totals.high)

        shift = _falling_root(
            lambda shift: totals_at(shift).sum(axis=1),
            np.ones(len(points)),
            points.min(axis=1) - 1.0,
            points.max(axis=1) + 1.0,
        )
        totals = totals_at(shift)
        nearest = np.empty(points.shape)
        for place, members in enumerate(self.members.values()):
            nearest[:, members] = _nearest_with_sum(
                points[:, members], self._bounds_of(members), totals[:, place]
            )
        return nearest

    def corners(self) -> Array:
        """Return the mixtures nearest to every domain alone ``(D, D)``."""
        return self.project(np.eye(len(self.domains)))

    def alone(self, group: str, inside: Array) -> Array:
        """Return a mixture in which the group has as much as bounds allow, room inside included.

        Without bounds that is everything. A group that has all its domains can give has only one
        mixture inside, so no more is taken than the middle between their least and largest sums.
        """
        place = list(self.members).index(group)
        others = np.arange(len(self.members)) != place
        least = max(self.totals.low[place], 1 - self.totals.high[others].sum())
        largest = min(self.totals.high[place], 1 - self.totals.low[others].sum())
        members = self.members[group]
        middle = (self.bounds.low[members] + self.bounds.high[members]).sum() / 2
        total = float(np.clip(middle, least, largest))
        low, high = self.totals.low.copy(), self.totals.high.copy()
        low[place] = high[place] = total
        wanted = np.full(len(low), (1 - total) / max(len(low) - 1, 1))
        return self.compose(project(wanted, Bounds(low, high)), inside)


def _falling_root(
    function: Callable[[Array], Array], wanted: Array, below: Array, above: Array
) -> Array:
    """Return where a falling function takes the wanted values, element by element."""
    for _ in range(_HALVINGS):
        middle = (below + above) / 2
        is_below = function(middle) > wanted
        below, above = np.where(is_below, middle, below), np.where(is_below, above, middle)
    return (below + above) / 2


def _nearest_with_sum(points: Array, bounds: Bounds, sums: Array | float) -> Array:
    """Return the nearest points ``(..., N)`` within the bounds that have the sums ``(...,)``."""
    sums = np.asarray(sums, dtype=np.float64)
    shift = _falling_root(
        lambda shift: np.clip(points - shift[..., None], bounds.low, bounds.high).sum(axis=-1),
        sums,
        points.min(axis=-1) - 1.0,
        points.max(axis=-1) + 1.0,
    )
    nearest = np.clip(points - shift[..., None], bounds.low, bounds.high)
    inside = ((points >= bounds.low) & (points <= bounds.high)).all(axis=-1)
    fits = inside & (np.abs(points.sum(axis=-1) - sums) <= TOLERANCE * 1e-3)
    return np.where(fits[..., None], points, nearest)


class Frame(Protocol):
    """The mixtures in which one stage moves.

    Attributes:
        variables: names of the coordinates.
        bounds: of the coordinates, which sum to one.
        proportional: the coordinates proportional to tokens.
    """

    variables: tuple[str, ...]
    bounds: Bounds
    proportional: Array

    def embed(self, coordinates: Array) -> Array:
        """Return the mixture ``(D,)`` at these coordinates, within all bounds."""
        ...

    def read(self, mixture: Array) -> Array:
        """Return the coordinates of a mixture, whether or not it lies in the frame."""
        ...

    def pull_back(self, coordinates: Array, gradient: Array) -> Array:
        """Return what a gradient per domain ``(D,)`` is per coordinate, at these coordinates."""
        ...


class Between:
    """The shares of the groups, with a given mixture inside each.

    Args:
        levels: the groups.
        inside: ``(D,)``, see :meth:`Levels.compose`.
        proportional: the mixture proportional to tokens ``(D,)``.
    """

    def __init__(self, levels: Levels, inside: Array, proportional: Array) -> None:
        self._levels, self._inside = levels, inside
        self.variables = tuple(levels.members)
        self.bounds = levels.totals
        self.proportional = levels.totals_of(proportional)

    def embed(self, coordinates: Array) -> Array:
        """Return the mixture of these group shares."""
        return self._levels.compose(coordinates, self._inside)

    def read(self, mixture: Array) -> Array:
        """Return the shares of the groups."""
        return self._levels.totals_of(mixture)

    def pull_back(self, coordinates: Array, gradient: Array) -> Array:
        """Return the derivative by every group's share.

        The mixture inside a group bends where a domain meets its bound, and is linear elsewhere:
        differences are exact but there.
        """
        step = 1e-4 * np.maximum(self.bounds.high - self.bounds.low, 1e-3)
        below = np.maximum(coordinates - step, self.bounds.low)
        above = np.minimum(coordinates + step, self.bounds.high)
        moved = self.embed(above) - self.embed(below)
        width = np.where(above > below, above - below, 1.0)
        return self._levels.totals_of(gradient * moved) / width


class Inside:
    """The mixture inside one group, with its share and all other domains fixed.

    Args:
        levels: the groups.
        group: the one that moves.
        around: a mixture ``(D,)`` within all bounds, in which the group has a share.
        proportional: the mixture proportional to tokens ``(D,)``.
    """

    def __init__(self, levels: Levels, group: str, around: Array, proportional: Array) -> None:
        self._members, self._around = levels.members[group], around
        self.total = float(around[self._members].sum())
        self.variables = tuple(levels.domains[place] for place in self._members)
        self.bounds = levels.inner_bounds(self._members, max(self.total, TOLERANCE))
        tokens = proportional[self._members]
        self.proportional = tokens / tokens.sum()

    @property
    def freedom(self) -> float:
        """Return by how much the share of the most mobile domain inside can change."""
        rest_low = self.bounds.low.sum() - self.bounds.low
        rest_high = self.bounds.high.sum() - self.bounds.high
        least = np.maximum(self.bounds.low, 1 - rest_high)
        largest = np.minimum(self.bounds.high, 1 - rest_low)
        return float((largest - least).max())

    def embed(self, coordinates: Array) -> Array:
        """Return the mixture with these shares inside the group."""
        mixture = self._around.copy()
        mixture[self._members] = self.total * coordinates
        return mixture

    def read(self, mixture: Array) -> Array:
        """Return the shares inside the group; where it has none, zeros."""
        part = mixture[self._members]
        return np.asarray(part / part.sum()) if part.sum() > 0 else np.zeros(len(part))

    def pull_back(self, coordinates: Array, gradient: Array) -> Array:
        """Return the derivative by every share inside the group."""
        return np.asarray(self.total * gradient[self._members])


class Everything:
    """All domains as they are."""

    def __init__(self, levels: Levels, proportional: Array) -> None:
        self.variables, self.bounds = levels.domains, levels.bounds
        self.proportional = proportional

    def embed(self, coordinates: Array) -> Array:
        """Return the coordinates, which are a mixture."""
        return coordinates

    def read(self, mixture: Array) -> Array:
        """Return the mixture, which is its coordinates."""
        return mixture

    def pull_back(self, coordinates: Array, gradient: Array) -> Array:
        """Return the gradient as it is."""
        return gradient
