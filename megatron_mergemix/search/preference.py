"""What a mixture is worth besides its utility: nearness to a prior the user trusts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_mergemix import config
from megatron_mergemix.mixtures.simplex import Array, named_mixture


class Preference:
    """Minus ``search.kl`` times the divergence ``KL(mixture || prior)``, in units of the utility.

    Args:
        settings: ``prior`` and ``kl``.
        domains: their order is the order of all vectors.
        proportional: the mixture proportional to the tokens of the domains ``(D,)``.

    Raises:
        ConfigError: a prior that is no mixture of the domains.
    """

    def __init__(
        self, settings: config.Search, domains: Sequence[str], proportional: Array
    ) -> None:
        tokens = dict(zip(domains, proportional, strict=True))
        self.kl = settings.kl
        self._prior = named_mixture(settings.prior, domains, tokens, "search.prior")

    def __call__(self, points: Array) -> Array:
        """Return what is added to the utility of mixtures ``(P, D)``, ``(P,)``; never above 0."""
        if self.kl == 0:
            return np.zeros(len(points))
        # A share of 0 costs nothing: the limit of x log x.
        ratio = np.where(points > 0, points, 1.0) / np.where(points > 0, self._prior, 1.0)
        return -self.kl * (points * np.log(ratio)).sum(axis=1)

    def slope(self, point: Array) -> Array:
        """Return the derivative of what is added, by the shares of one mixture ``(D,)``.

        At a share of 0, where it has no bound, it is that of a share of 1e-9.
        """
        if self.kl == 0:
            return np.zeros(len(point))
        prior = np.maximum(self._prior, 1e-300)
        return np.asarray(-self.kl * (np.log(np.maximum(point, 1e-9) / prior) + 1.0))
