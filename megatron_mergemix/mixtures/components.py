"""How well what the experts were trained on stands for every mixture of the domains.

The component matrix ``M`` (K experts x D domains) turns a mixture into merge weights. A bad matrix
needs large ones: they let the noise of the experts' training, and the rounding of their
checkpoints, into every proxy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mergemix.errors import ConfigError
from megatron_mergemix.mixtures.merge_weights import merge_weights
from megatron_mergemix.mixtures.simplex import Array, Bounds, corners, project, uniform

MAX_CONDITION_NUMBER = 1e3
"""A component matrix beyond this needs merge weights in the hundreds to reach some mixtures."""

LARGE_NORM = 3.0
"""Merge weights of a larger norm earn a warning: a proxy as noisy as that many single experts."""

_NOTICEABLE = 0.1
"""Coefficients below this part of the largest one are left out of an explanation."""


def check_components(
    matrix: Array, experts: Sequence[str], domains: Sequence[str], remedy: str | None = None
) -> None:
    """Check that merge weights of a reasonable size reach every mixture.

    Args:
        matrix: components as rows, ``(K, D)``.
        experts: names of the rows.
        domains: names of the columns.
        remedy: what to change; by default it is found in the matrix.

    Raises:
        ConfigError: fewer components than domains, or components that hardly differ in some
            respect; says in which.
    """
    num_components, num_domains = matrix.shape
    if num_components < num_domains:
        raise ConfigError(
            f"{num_components} experts cannot stand for every mixture of {num_domains} domains; "
            "expected at least as many experts as domains."
        )
    rows, sizes, columns = np.linalg.svd(matrix, full_matrices=False)
    condition = sizes[0] / sizes[-1] if sizes[-1] > 0 else np.inf
    if condition <= MAX_CONDITION_NUMBER:
        return
    if remedy is None:
        remedy = _remedy(columns[-1], domains)
        if num_components == num_domains:  # else rows depend on each other in any matrix
            names = [f"experts.components.{experts[place]}" for place in _noticeable(rows[:, -1])]
            remedy = f"Nearly dependent rows: {', '.join(names)}. {remedy}"
    raise ConfigError(
        "The experts' training mixtures are too much alike: their matrix has the condition number "
        f"{condition:.3g}, at most {MAX_CONDITION_NUMBER:g} is accepted. {remedy}"
    )


def _noticeable(coefficients: Array) -> list[int]:
    """Return the places of all but small coefficients."""
    sizes = np.abs(coefficients)
    return [int(place) for place in np.flatnonzero(sizes >= _NOTICEABLE * sizes.max())]


def _remedy(direction: Array, domains: Sequence[str]) -> str:
    """Return what all components have in common, and what would end it.

    Args:
        direction: the unit vector ``v`` over domains of the least singular value: ``M v`` is
            nearly 0, so the parts of ``v`` of either sign weigh the same in every component.
        domains: names of its entries.
    """
    scaled = direction / direction[np.argmax(np.abs(direction))]
    kept = _noticeable(scaled)
    left = [_term(scaled[place], domains[place]) for place in kept if scaled[place] > 0]
    right = [_term(-scaled[place], domains[place]) for place in kept if scaled[place] < 0]
    purest = domains[int(np.argmax(scaled))]
    if not right:
        return (
            f"No component has more than a trace of {' or '.join(domains[p] for p in kept)}. "
            f"Train an expert on {purest}."
        )
    return (
        f"In every component, nearly, {' + '.join(left)} = {' + '.join(right)}. Train one on "
        f"clearly more of {purest} than that."
    )


def _term(factor: float, domain: str) -> str:
    return domain if abs(factor - 1) < 0.005 else f"{factor:.2g} {domain}"


# ---- noise ----


@dataclass(frozen=True)
class Amplification:
    """L2 norms of merge weights: by how much a proxy amplifies the noise of one expert's training.

    Independent noise of the experts adds up as the squares of their weights do.

    Attributes:
        vertices: domain -> at that domain alone, or at the nearest mixture within the bounds. No
            mixture has larger ones, unless bounds cut the simplex.
        uniform: at equal shares, or at the nearest mixture within the bounds.
    """

    vertices: dict[str, float]
    uniform: float

    @property
    def largest(self) -> tuple[str, float]:
        """Return the domain with the largest norm, and that norm."""
        return max(self.vertices.items(), key=lambda pair: pair[1])


def norm(weights: Iterable[float]) -> float:
    """Return the L2 norm of merge weights."""
    return float(np.linalg.norm(np.fromiter(weights, np.float64)))


def amplification(matrix: Array, domains: Sequence[str], bounds: Bounds) -> Amplification:
    """Return how much noise the proxies of a search let through.

    Args:
        matrix: ``(K, D)``, accepted by :func:`check_components`.
        domains: names of the columns.
        bounds: least and largest share per domain.
    """
    equal = project(uniform(len(domains)), bounds)
    return Amplification(
        vertices={
            domain: norm(merge_weights(corner, matrix))
            for domain, corner in zip(domains, corners(bounds), strict=True)
        },
        uniform=norm(merge_weights(equal, matrix)),
    )


def noise_notes(what: str, size: float) -> Iterator[str]:
    """Yield a sentence about merge weights if their norm is large.

    Args:
        what: the mixture that they stand for; begins the sentence.
        size: their norm.
    """
    if size > LARGE_NORM:
        yield (
            f"{what} has merge weights (alpha) of norm {size:.3g}: its proxy has {size:.3g} times "
            "the noise of one expert's training. Purer experts (a lower experts.general_share, "
            "other experts.components) need smaller weights; experts.average_last lowers the noise "
            "itself."
        )


def weights_text(mixture: Mapping[str, float], weights: Mapping[str, float]) -> str:
    """Return ``alpha math 1.22 code -0.11 (norm 1.23)``; nothing where alpha is the mixture itself.

    Args:
        mixture: over domains; empty for the base.
        weights: expert -> merge weight.
    """
    if not mixture or dict(mixture) == dict(weights):
        return ""
    listed = " ".join(f"{name} {weight:.2f}" for name, weight in weights.items())
    return f"alpha {listed} (norm {norm(weights.values()):.2f})"
