"""The search for the best mixture: strategies, surrogates, and the loop that drives them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from megatron_mergemix import config as settings
from megatron_mergemix.search.strategy import Strategy

STRATEGIES = {
    "mergemix": "megatron_mergemix.search.mergemix:MergeMix",
}
"""Name -> ``module:class``. By name, so that scipy is imported by those who search."""


def make_strategy(config: settings.Config, tokens: Mapping[str, float]) -> Strategy:
    """Return the strategy that ``config.search`` asks for, knowing no trials yet.

    Args:
        config: the experiment.
        tokens: domain -> training tokens it has.

    Raises:
        ConfigError: bounds, utility or number of trials that do not fit the domains.
    """
    from megatron_mergemix.evaluate.utility import Utility, objective_of
    from megatron_mergemix.simplex import mixture_bounds, proportional

    module, name = STRATEGIES[config.search.strategy].split(":")
    strategy: Strategy = getattr(importlib.import_module(module), name)(
        domains=list(config.domains),
        utility=Utility(config.evaluate.utility, objective_of(config.evaluate)),
        bounds=mixture_bounds(config.domains, tokens, config.blend.train_tokens),
        proportional=proportional(tokens, list(config.domains)),
        settings=config.search,
    )
    return strategy
