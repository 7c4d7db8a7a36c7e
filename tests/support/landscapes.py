"""A synthetic benchmark surface with a known optimum, for judging searches.

Every capability's accuracy is a logistic of a concave quadratic of the mixture with its own best
mixture, as several capabilities that pull in different directions give. The utility is their
mean accuracy. Measured accuracies carry binomial noise of ``num_items`` questions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_mergemix.journal import Score, Trial
from megatron_mergemix.search.strategy import Proposal

Array = NDArray[np.float64]


class Landscape:
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
        return self.accuracies(points).mean(axis=-1)

    def optimum(self) -> float:
        """Return the largest noise-free mean accuracy: multiplicative ascent from many starts."""
        rng = np.random.default_rng(0)
        points = rng.dirichlet(np.ones(len(self.domains)), size=1000)
        for step in np.geomspace(0.3, 0.003, 60):
            moved = 0.999 * points * np.exp(step * rng.normal(size=points.shape)) + 0.001 * step
            moved /= moved.sum(axis=1, keepdims=True)
            better = self.utility(moved) > self.utility(points)
            points[better] = moved[better]
        return float(self.utility(points).max())

    def measure(self, proposal: Proposal, num_items: int = 300, seed: int = 0) -> Trial:
        """Return the proposal as a finished trial; noise depends on seed and index alone."""
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
