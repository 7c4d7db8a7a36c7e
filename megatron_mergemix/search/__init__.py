"""The search for the best mixture: strategies, surrogates, and the loop that drives them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from megatron_mergemix import config
from megatron_mergemix.search.strategy import Strategy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron_mergemix.evaluate.utility import Utility
    from megatron_mergemix.simplex import Array, Bounds

STRATEGIES = {
    "mergemix": "megatron_mergemix.search.mergemix:MergeMix",
}
"""Name -> ``module:class``. By name, so that scipy is imported by those who search."""


def make_strategy(
    settings: config.Search,
    *,
    domains: Sequence[str],
    utility: Utility,
    bounds: Bounds,
    proportional: Array,
) -> Strategy:
    """Return the strategy that ``search.strategy`` names, knowing no trials yet.

    Args:
        settings: the section ``search``.
        domains: their order is the order of all vectors.
        utility: the number that is maximised.
        bounds: least and largest share per domain.
        proportional: the mixture proportional to the tokens of the domains ``(D,)``.

    Raises:
        ConfigError: bounds or a number of trials that do not fit the domains.
    """
    module, name = STRATEGIES[settings.strategy].split(":")
    strategy: Strategy = getattr(importlib.import_module(module), name)(
        domains=domains,
        utility=utility,
        bounds=bounds,
        proportional=proportional,
        settings=settings,
    )
    return strategy
