"""Items that candidates of a synthetic benchmark get right or wrong, one by one.

An item is right where ``sqrt(c) * item + sqrt(1 - c) * luck`` is below what the accuracy of the
mixture asks for, both standard normal: ``item`` is how hard it is and the same for every candidate,
``luck`` a candidate's own. So the number of right ones is binomial, and candidates have a part
``c`` of its noise in common.
"""

from __future__ import annotations

import zlib

import numpy as np
from scipy.special import ndtri

from megatron_mergemix.mixtures.simplex import Array
from megatron_mergemix.search.strategy import Proposal
from megatron_mergemix.synthetic.surfaces import SyntheticSurface
from megatron_mergemix.trials import Score, Scores, Trial


class Items:
    """The items of every capability of a surface, in one order for all candidates.

    Args:
        surface: the true accuracies.
        seed: of items and luck.
        in_common: part of the noise that all candidates share.
        count: items per capability.

    Attributes:
        scored: items of one capability, over all models.
    """

    def __init__(
        self, surface: SyntheticSurface, seed: int, in_common: float, count: int = 300
    ) -> None:
        self._surface, self._seed, self._in_common = surface, seed, in_common
        self._count = count
        shape = (len(surface.capabilities), count)
        self._items = np.random.default_rng([seed, 20]).normal(size=shape)
        self.scored = 0

    def measure(self, proposal: Proposal) -> Trial:
        """Return the proposal as a finished trial."""
        surface = self._surface
        uniform = {name: 1 / len(surface.domains) for name in surface.domains}
        mixture = proposal.mixture or uniform
        point = np.array([mixture[name] for name in surface.domains])
        begun = 0
        if proposal.begun is not None:
            begun = proposal.begun[surface.capabilities[0]]["accuracy"].num_samples
        count = self._count if proposal.first is None else round(proposal.first * self._count)
        # The luck of a mixture is its own, so that both searches differ in what they measure alone.
        name = zlib.crc32(np.round(point, 9).tobytes())
        rng = np.random.default_rng([self._seed, name])
        luck = rng.normal(size=self._items.shape)
        level = np.sqrt(self._in_common) * self._items + np.sqrt(1 - self._in_common) * luck
        right = level < ndtri(surface.accuracies(point))[:, None]
        self.scored += count - begun
        return Trial(
            index=proposal.index,
            purpose=proposal.purpose,
            mixture=dict(proposal.mixture),
            merge_weights=dict(proposal.mixture),
            scores=_scores(surface, right[:, begun:count].astype(np.float64), proposal.begun),
            first=proposal.first,
        )


def _scores(surface: SyntheticSurface, right: Array, begun: Scores | None) -> Scores:
    found: dict[str, dict[str, Score]] = {}
    for name, row in zip(surface.capabilities, right, strict=True):
        items = (*(begun[name]["accuracy"].items if begun else ()), *row.tolist())
        value = float(np.mean(items))
        error = float(np.sqrt(value * (1 - value) / len(items)))
        found[name] = {"accuracy": Score(value, error, len(items), "accuracy", True, items)}
    return found
