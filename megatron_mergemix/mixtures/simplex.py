"""Mixtures as points on the simplex: lattices, samples and bounds.

A mixture ``lambda`` is a vector of D shares of training tokens that sums to one, in the order
of the domains. All arrays are float64.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from itertools import combinations
from math import comb
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_mergemix.errors import ConfigError
from megatron_mergemix.mixtures.projection import TOLERANCE, has_room, onto_box, onto_supports

if TYPE_CHECKING:
    from megatron_mergemix.config import Domain

Array = NDArray[np.float64]


class Bounds(NamedTuple):
    """Which mixtures are allowed.

    Attributes:
        low: least share per domain ``(D,)``.
        high: largest share per domain ``(D,)``.
        floor: no share lies between 0 and this. With a floor the region is not convex.
    """

    low: Array
    high: Array
    floor: float = 0.0


# ---- mixtures by name ----


def to_vector(
    mixture: Mapping[str, float], domains: Sequence[str], where: str = "mixture"
) -> Array:
    """Return the mixture as a vector in the order of ``domains``; a domain left out has share 0.

    Raises:
        ConfigError: an unknown domain, a negative or non-finite share, or a sum that is not 1
            within 1e-6 (``where`` is the key path the message names).
    """
    for name, share in mixture.items():
        if name not in domains:
            near = difflib.get_close_matches(name, domains, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"{where}: {name!r} is not a domain.{hint} Domains: {', '.join(domains)}."
            )
        if not np.isfinite(share) or share < 0:
            raise ConfigError(f"{where}.{name} is {share}; expected a share between 0 and 1.")
    vector = np.array([mixture.get(name, 0.0) for name in domains], dtype=np.float64)
    total = vector.sum()
    if abs(total - 1) > 1e-6:
        raise ConfigError(f"{where}: the shares sum to {total:.6g}; expected 1.")
    # A mixture that is already normalised keeps its bits, so journals compare exactly.
    return vector if abs(total - 1) <= 1e-12 else vector / total


def to_mixture(point: ArrayLike, domains: Sequence[str]) -> dict[str, float]:
    """Return the vector as a mapping domain -> share, in the order of ``domains``."""
    return {name: float(share) for name, share in zip(domains, np.asarray(point), strict=True)}


def uniform(num_domains: int) -> Array:
    """Return the mixture with equal shares."""
    return np.full(num_domains, 1 / num_domains)


def proportional(tokens: Mapping[str, float], domains: Sequence[str]) -> Array:
    """Return the mixture proportional to the tokens each domain has."""
    counts = np.array([tokens[name] for name in domains], dtype=np.float64)
    return counts / counts.sum()


def named_mixture(
    mixture: str | Mapping[str, float],
    domains: Sequence[str],
    tokens: Mapping[str, float],
    where: str = "mixture",
) -> Array:
    """Return the vector of a mixture given as ``uniform``, ``proportional`` or a mapping.

    Raises:
        ConfigError: another word, or a mapping that :func:`to_vector` refuses.
    """
    if mixture == "uniform":
        return uniform(len(domains))
    if mixture == "proportional":
        return proportional(tokens, domains)
    if isinstance(mixture, str):
        raise ConfigError(
            f"{where} is {mixture!r}; expected uniform, proportional, or shares by domain."
        )
    return to_vector(mixture, domains, where)


# ---- bounds ----


def mixture_bounds(
    domains: Mapping[str, Domain],
    tokens: Mapping[str, float],
    train_tokens: float | None = None,
    floor: float = 0.0,
) -> Bounds:
    """Return the bounds of any mixture the search may measure or recommend.

    ``domains.<name>.bounds``, with the upper one lowered to the share at which
    ``max_epochs`` passes over the domain's tokens make its part of ``train_tokens``, and
    ``search.min_share`` as the floor.

    Raises:
        ConfigError: no mixture satisfies them.
    """
    low = np.array([domain.bounds[0] for domain in domains.values()], dtype=np.float64)
    high = np.array([domain.bounds[1] for domain in domains.values()], dtype=np.float64)
    for index, (name, domain) in enumerate(domains.items()):
        if train_tokens is not None and domain.max_epochs is not None:
            high[index] = min(high[index], domain.max_epochs * tokens[name] / train_tokens)
    bounds = Bounds(low, high, floor)
    check_bounds(bounds, list(domains))
    return bounds


def check_bounds(bounds: Bounds, domains: Sequence[str]) -> None:
    """Check that some mixture lies within the bounds.

    Raises:
        ConfigError: a lower bound exceeds the upper one, the lower bounds sum to more than 1, the
            upper ones to less, or every mixture has a share below the floor.
    """
    for name, low, high in zip(domains, bounds.low, bounds.high, strict=True):
        if not 0 <= low <= high <= 1:
            raise ConfigError(
                f"domains.{name}: the least share is {low:.6g} and the largest {high:.6g} (bounds, "
                "max_epochs); expected 0 <= least <= largest <= 1."
            )
    if bounds.low.sum() > 1 + TOLERANCE:
        raise ConfigError(
            f"The least shares of the domains sum to {bounds.low.sum():.6g}; no mixture has a sum "
            "of 1. Lower domains.*.bounds."
        )
    if bounds.high.sum() < 1 - TOLERANCE:
        raise ConfigError(
            f"The largest shares of the domains sum to {bounds.high.sum():.6g}; no mixture has a "
            "sum of 1. Raise domains.*.bounds or domains.*.max_epochs."
        )
    if not has_room(*bounds):
        raise ConfigError(
            f"No mixture within domains.*.bounds and domains.*.max_epochs has all its shares at 0 "
            f"or above search.min_share, {bounds.floor:.6g}. Lower search.min_share."
        )


def whole_simplex(num_domains: int) -> Bounds:
    """Return the bounds that bound nothing."""
    return Bounds(np.zeros(num_domains), np.ones(num_domains))


def within(points: ArrayLike, bounds: Bounds) -> NDArray[np.bool_]:
    """Return for each point ``(..., D)`` whether it is a mixture within the bounds."""
    points = np.asarray(points, dtype=np.float64)
    inside = (points >= bounds.low - TOLERANCE) & (points <= bounds.high + TOLERANCE)
    inside &= (points <= TOLERANCE) | (points >= bounds.floor - TOLERANCE)
    return inside.all(axis=-1) & (np.abs(points.sum(axis=-1) - 1) <= TOLERANCE)


def project(points: ArrayLike, bounds: Bounds) -> Array:
    """Return the nearest mixture within the bounds for each point ``(..., D)``.

    A point that is within the bounds already keeps its bits. With a floor, the domains that have
    a share at all are those with the largest coordinates, as many as bring the mixture nearest;
    that is exact where all domains have the same bounds, and near it elsewhere.
    """
    points = np.asarray(points, dtype=np.float64)
    flat = points.reshape(-1, points.shape[-1])
    projected = flat.copy()
    outside = ~within(flat, bounds)
    if bounds.floor > 0:
        projected[outside] = onto_supports(flat[outside], *bounds)
    else:
        projected[outside] = onto_box(flat[outside], bounds.low, bounds.high)
    return projected.reshape(points.shape)


def corners(bounds: Bounds) -> Array:
    """Return the D mixtures within the bounds that are nearest to the pure domains ``(D, D)``."""
    return project(np.eye(len(bounds.low)), bounds)


# ---- point sets ----


def lattice_size(num_domains: int, steps: int) -> int:
    """Return how many points :func:`lattice` has."""
    return comb(steps + num_domains - 1, num_domains - 1)


def lattice(num_domains: int, steps: int) -> Array:
    """Return all mixtures whose shares are multiples of ``1/steps``.

    Shape ``(lattice_size, D)``; the largest first shares come first.
    """
    # Stars and bars: D - 1 bars among the steps; a share is the number of steps between two bars.
    places = range(steps + num_domains - 1)
    bars = np.array(list(combinations(places, num_domains - 1)), dtype=np.int64)[::-1]
    bars = np.pad(bars, ((0, 0), (1, 0)), constant_values=-1)
    bars = np.pad(bars, ((0, 0), (0, 1)), constant_values=len(places))
    return (np.diff(bars, axis=1) - 1) / steps


def bounded_lattice(bounds: Bounds, steps: int) -> Array:
    """Return the lattice of the region within the bounds.

    The simplex above the lower bounds is itself a simplex, of size ``1 - sum(low)``: its lattice
    is taken, without the points that exceed an upper bound.
    """
    points = bounds.low + (1 - bounds.low.sum()) * lattice(len(bounds.low), steps)
    return points[within(points, bounds)]


def sample_dirichlet(concentration: ArrayLike, num: int, rng: np.random.Generator) -> Array:
    """Return ``num`` draws ``(num, D)`` from the Dirichlet distribution."""
    draws = rng.standard_gamma(
        np.asarray(concentration, dtype=np.float64), size=(num, np.size(concentration))
    )
    # With a tiny concentration all gammas may underflow; such a row is redrawn as a vertex.
    dead = np.flatnonzero(draws.sum(axis=1) == 0)
    draws[dead, rng.integers(draws.shape[1], size=len(dead))] = 1.0
    return draws / draws.sum(axis=1, keepdims=True)


def sample_uniform(bounds: Bounds, num: int, rng: np.random.Generator) -> Array:
    """Return ``num`` mixtures ``(num, D)`` spread evenly over the region within the bounds.

    Where the bounds cut the simplex, pairs of coordinates are redrawn uniformly on the segment
    their sum and bounds leave (Gibbs sampling, whose stationary law is uniform), for each point
    from its own start.
    """
    points = sample_dirichlet(np.ones(len(bounds.low)), num, rng)
    if within(points, bounds).all():
        return points
    points = project(points, bounds)
    num_domains = points.shape[1]
    for _ in range(20 * num_domains):
        i, j = rng.choice(num_domains, size=2, replace=False)
        total = points[:, i] + points[:, j]
        least = np.maximum(bounds.low[i], total - bounds.high[j])
        largest = np.minimum(bounds.high[i], total - bounds.low[j])
        points[:, i] = least + np.maximum(largest - least, 0) * rng.random(num)
        # Rounding would leave a share of 0 a little below it.
        points[:, j] = np.clip(total - points[:, i], bounds.low[j], bounds.high[j])
    return project(points, bounds)


def dense_points(bounds: Bounds, rng: np.random.Generator, num: int = 20_000) -> Array:
    """Return about ``num`` mixtures within the bounds, dense enough to look for an optimum.

    The finest lattice of at most half of them (it alone has points on every face), the corners,
    and a rest that is half uniform and half sparse (Dirichlet 0.3, projected into the bounds).
    """
    num_domains = len(bounds.low)
    steps = 1
    while steps < 100 and lattice_size(num_domains, steps + 1) <= num // 2:
        steps += 1
    fixed = np.concatenate([corners(bounds), bounded_lattice(bounds, steps)])
    rest = max(num - len(fixed), 2)
    sparse = sample_dirichlet(np.full(num_domains, 0.3), rest // 2, rng)
    spread = sample_uniform(bounds, rest - rest // 2, rng)
    return np.concatenate([fixed, project(sparse, bounds), spread])
