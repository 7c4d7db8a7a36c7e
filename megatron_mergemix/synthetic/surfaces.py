"""A synthetic benchmark surface with a known optimum, for judging searches.

Every capability's accuracy is a logistic of a concave quadratic of the mixture with its own best
mixture, as several capabilities that pull in different directions give. The utility is their
mean accuracy. Measured accuracies carry binomial noise of ``num_items`` questions.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np

from megatron_mergemix.mixtures.simplex import Array, project, whole_simplex
from megatron_mergemix.search.strategy import Proposal
from megatron_mergemix.trials import Gradient, Minibatch, Score, Trial

NUM_STARTS = 64
"""Of the climbs to the optimum, all at the same time."""


class SyntheticSurface:
    """One seeded surface over ``num_domains`` domains."""

    def __init__(self, num_domains: int, seed: int, num_capabilities: int = 5) -> None:
        rng = np.random.default_rng([seed, num_domains])
        self.domains = [f"domain{index}" for index in range(num_domains)]
        self.capabilities = [f"capability{index}" for index in range(num_capabilities)]
        self._best = rng.dirichlet(np.full(num_domains, 0.7), size=num_capabilities)
        self._top = rng.uniform(-0.5, 1.0, size=num_capabilities)
        self._bend = rng.uniform(0.5, 3.0, size=(num_capabilities, num_domains))

    def accuracies(self, points: Array) -> Array:
        """Return the noise-free accuracies ``(..., C)`` of mixtures ``(..., D)``."""
        offset = points[..., None, :] - self._best
        logits = self._top - (self._bend * offset**2).sum(axis=-1)
        return 1 / (1 + np.exp(-logits))

    def utility(self, points: Array) -> Array:
        """Return the noise-free mean accuracy ``(...,)``."""
        return np.asarray(self.accuracies(points).mean(axis=-1))

    @cached_property
    def optimum(self) -> float:
        """The largest noise-free mean accuracy: projected gradient climbs from many starts."""
        bounds = whole_simplex(len(self.domains))
        rng = np.random.default_rng(0)
        points = rng.dirichlet(np.ones(len(self.domains)), size=NUM_STARTS)
        for _ in range(2000):
            moved = project(points + 0.5 * self._slope(points), bounds)
            still = np.abs(moved - points).max() < 1e-9
            points = moved
            if still:
                break
        return float(np.max(self.utility(points)))

    def _slope(self, points: Array) -> Array:
        """Return the gradient of the mean accuracy ``(P, D)``."""
        return np.asarray(self.slopes(points).mean(axis=1))

    def slopes(self, points: Array) -> Array:
        """Return the noise-free derivatives of the accuracies ``(P, C, D)`` at ``(P, D)``."""
        accuracies = self.accuracies(points)
        offset = points[:, None, :] - self._best
        return -2 * (accuracies * (1 - accuracies))[..., None] * self._bend * offset

    def measure(self, proposal: Proposal, num_items: int = 300, seed: int = 0) -> Trial:
        """Return the proposal as a finished trial; noise depends on seed and index alone.

        Of a gradient every question's derivatives scatter about their mean by as much as that is.
        """
        if proposal.minibatch is not None:
            return self._differentiate(proposal, proposal.minibatch, num_items, seed)
        uniform = {name: 1 / len(self.domains) for name in self.domains}
        mixture = proposal.mixture or uniform
        accuracies = self.accuracies(np.array([mixture[name] for name in self.domains]))
        rng = np.random.default_rng([seed, proposal.index])
        measured = rng.binomial(num_items, accuracies) / num_items
        scores = {
            name: {
                "accuracy": Score(
                    value=float(value),
                    stderr=float(np.sqrt(value * (1 - value) / num_items)),
                    num_samples=num_items,
                    unit="accuracy",
                    higher_is_better=True,
                )
            }
            for name, value in zip(self.capabilities, measured, strict=True)
        }
        return Trial(
            index=proposal.index,
            purpose=proposal.purpose,
            mixture=dict(proposal.mixture),
            merge_weights=dict(proposal.mixture),
            scores=scores,
        )

    def _differentiate(
        self, proposal: Proposal, minibatch: Minibatch, num_items: int, seed: int
    ) -> Trial:
        num = max(1, round(minibatch.share * num_items))
        scored = self.measure(replace(proposal, minibatch=None), num, seed)
        point = np.array([proposal.mixture[name] for name in self.domains])
        slopes = self.slopes(point[None])[0]
        size = np.sqrt((slopes**2).mean(axis=1, keepdims=True) / num)
        rng = np.random.default_rng([seed, proposal.index, 1])
        noisy = slopes + size * rng.normal(size=slopes.shape)
        found = {
            capability: {"accuracy": dict(zip(self.domains, map(float, row), strict=True))}
            for capability, row in zip(self.capabilities, noisy, strict=True)
        }
        return replace(scored, scores={}, gradient=Gradient(minibatch, scored.scores, found))
