"""Merge methods as arithmetic on slices, each with its source.

A method sees the base and the experts of non-zero weight as flat tensors and writes the merged
slice. What it must know about a whole unit (see :mod:`.slices`) comes from scans that ran before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_mergemix.merge.linear import BLOCK, base_weight, weighted_sum_
from megatron_mergemix.merge.masks import kept
from megatron_mergemix.merge.slices import Slice, unit_of

Unit = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Recipe:
    """What is merged, apart from where it lies.

    Attributes:
        method: a key of ``METHODS``.
        weights: one per expert, not zero; what they mean is the method's.
        scale: factor on the merged task vector (lambda of task arithmetic); not for the methods
            that take no base.
        density: share of a task vector that ``ties`` and ``dare`` keep.
        seed: of the masks of ``dare``.
        facts: what was found in a pass over the tensors before, by unit, for methods that scan.
    """

    method: str
    weights: tuple[float, ...]
    scale: float = 1.0
    density: float = 1.0
    seed: int = 0
    facts: Mapping[Unit, Any] = field(default_factory=dict)

    def base_is_read(self) -> bool:
        """Say whether the base's weights enter at all."""
        return METHODS[self.method].reads_base(self)


@dataclass(frozen=True)
class Method:
    """A way to merge.

    Attributes:
        merge: ``(recipe, slice, out, sources, accumulator)``; sources are base, if it is read,
            and experts, flat and as long as ``out``, in any float dtype.
        reads_base: whether the base's weights enter.
        scan: name of the scan that it needs, if any.
    """

    merge: Callable[[Recipe, Slice, Tensor, Sequence[Tensor], Tensor], None]
    reads_base: Callable[[Recipe], bool]
    scan: str | None = None


def linear_weights(recipe: Recipe) -> list[float]:
    """Return the weights of base, if it is read, and experts in a weighted sum."""
    scaled = [recipe.scale * weight for weight in recipe.weights]
    base = base_weight(scaled)
    return [base, *scaled] if base != 0.0 else scaled


def _linear(
    recipe: Recipe, place: Slice, out: Tensor, sources: Sequence[Tensor], accumulator: Tensor
) -> None:
    """Return ``base + scale * sum_k w_k (expert_k - base)`` as one weighted sum.

    Sources: Model soups (arXiv 2203.05482), Sec. 2; task arithmetic (arXiv 2212.04089), Sec. 2.
    """
    weighted_sum_(out, sources, linear_weights(recipe), accumulator)


def _slerp(
    recipe: Recipe, place: Slice, out: Tensor, sources: Sequence[Tensor], accumulator: Tensor
) -> None:
    """Return the weighted mean on the sphere, unit by unit; see :mod:`.sphere`."""
    weighted_sum_(out, sources, recipe.facts[unit_of(*place[:2])], accumulator)


def _dare(
    recipe: Recipe, place: Slice, out: Tensor, sources: Sequence[Tensor], accumulator: Tensor
) -> None:
    """Drop each element of a task vector with probability ``1 - density``, rescale the rest.

    Source: DARE (arXiv 2311.03099), Sec. 3.1, on a task-arithmetic merge.
    """
    base, *experts = sources
    for start in range(0, out.numel(), BLOCK):
        part = slice(start, min(start + BLOCK, out.numel()))
        origin = base[part].float()
        total = accumulator[: origin.numel()].zero_()
        for number, (expert, weight) in enumerate(zip(experts, recipe.weights, strict=True)):
            mask = kept(recipe.seed, number, place, part, recipe.density)
            delta = (expert[part].float() - origin).mul_(mask)
            total.add_(delta, alpha=weight / recipe.density)
        out[part].copy_(origin.add(total, alpha=recipe.scale))


def _ties(
    recipe: Recipe, place: Slice, out: Tensor, sources: Sequence[Tensor], accumulator: Tensor
) -> None:
    """Trim small changes, elect a sign per element, average what agrees with it.

    Source: TIES-Merging (arXiv 2306.01708), Sec. 4, Algorithm 1. The sign is that of the weighted
    sum of the trimmed task vectors, and the average is weighted too; all weights equal is the
    paper. Task vectors are trimmed unit by unit.
    """
    base, *experts = sources
    thresholds = recipe.facts[unit_of(*place[:2])]
    for start in range(0, out.numel(), BLOCK):
        part = slice(start, min(start + BLOCK, out.numel()))
        origin = base[part].float()
        deltas = []
        elected = accumulator[: origin.numel()].zero_()
        for expert, weight, threshold in zip(experts, recipe.weights, thresholds, strict=True):
            delta = expert[part].float() - origin
            delta.mul_(delta.abs() >= threshold)
            elected.add_(delta, alpha=weight)
            deltas.append(delta)
        positive = elected >= 0
        total, mass = torch.zeros_like(origin), torch.zeros_like(origin)
        for delta, weight in zip(deltas, recipe.weights, strict=True):
            agrees = (delta != 0) & ((delta > 0) == positive)
            total.add_(delta.mul_(agrees), alpha=weight)
            mass.add_(agrees, alpha=weight)
        total.div_(mass.masked_fill_(mass == 0, 1.0))
        out[part].copy_(origin.add(total, alpha=recipe.scale))


def _always(recipe: Recipe) -> bool:
    return True


METHODS: Mapping[str, Method] = {
    "linear": Method(_linear, lambda recipe: len(linear_weights(recipe)) > len(recipe.weights)),
    "task_arithmetic": Method(
        _linear, lambda recipe: len(linear_weights(recipe)) > len(recipe.weights)
    ),
    "ties": Method(_ties, _always, scan="thresholds"),
    "dare": Method(_dare, _always),
    "slerp": Method(_slerp, lambda recipe: False, scan="products"),
}
"""Name -> method."""
