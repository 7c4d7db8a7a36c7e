"""The strategy and the bounds of an experiment, made from its settings."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from megatron_mergemix import config
from megatron_mergemix.config.groups import levels_of
from megatron_mergemix.evaluate.utility import Objective, Utility, objective_of
from megatron_mergemix.mixtures import simplex
from megatron_mergemix.search.strategy import Strategy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from megatron_mergemix.mixtures.simplex import Array, Bounds
    from megatron_mergemix.search.ensemble import Ensemble

STRATEGIES = {
    "gradient": "megatron_mergemix.search.mirror_descent:MirrorDescent",
    "mergemix": "megatron_mergemix.search.mergemix:MergeMix",
    "iterative": "megatron_mergemix.search.iterative:Iterative",
    "bayesian": "megatron_mergemix.search.bayesian:Bayesian",
    "grid": "megatron_mergemix.search.grid:Grid",
    "fixed": "megatron_mergemix.search.fixed:Fixed",
    "optuna": "megatron_mergemix.search.optuna_sampler:OptunaSampler",
}
"""Name -> ``module:class``. By name, so that scipy is imported by those who search."""


def make_strategy(
    settings: config.Search,
    *,
    domains: Sequence[str],
    utility: Utility,
    bounds: Bounds,
    proportional: Array,
    ensemble: Ensemble | None = None,
) -> Strategy:
    """Return the strategy that ``search.strategy`` names, knowing no trials yet.

    Args:
        settings: the section ``search``.
        domains: their order is the order of all vectors.
        utility: the number that is maximised.
        bounds: least and largest share per domain.
        proportional: the mixture proportional to the tokens of the domains ``(D,)``.
        ensemble: what the experts' probabilities predict, for ``search.ensemble``; else None.

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
        ensemble=ensemble,
    )
    return strategy


def bounds_of(experiment: config.Config, tokens: Mapping[str, float] | None) -> Bounds:
    """Return what every mixture of an experiment must obey; as far as known without tokens.

    Raises:
        ConfigError: no mixture does.
    """
    domains, floor = experiment.domains, experiment.search.min_share
    train_tokens = None if tokens is None else experiment.blend.train_tokens
    return simplex.mixture_bounds(domains, tokens or {}, train_tokens, floor)


def strategy_of(
    experiment: config.Config,
    tokens: Mapping[str, float] | None,
    ensemble: Ensemble | None = None,
    objective: Objective | None = None,
) -> Strategy:
    """Return the strategy of an experiment, that of its groups included, knowing no trials yet.

    Args:
        experiment: all its settings.
        tokens: of every domain, for training. None where they are not counted: good to see whether
            the settings fit, not to search, for neither ``max_epochs`` nor proportions are known.
        ensemble: what the experts' probabilities predict, for ``search.ensemble``; else None.
        objective: the metrics of every capability; None: as far as the settings tell, which
            serves to see whether they fit.

    Raises:
        ConfigError: bounds or a number of trials that do not fit the domains.
    """
    names, settings = list(experiment.domains), experiment.search
    metrics = objective_of(experiment.evaluate) if objective is None else objective
    utility = Utility(experiment.evaluate.utility, metrics)
    bounds = bounds_of(experiment, tokens)
    proportional = (
        simplex.uniform(len(names)) if tokens is None else simplex.proportional(tokens, names)
    )
    if settings.hierarchy is None:
        return make_strategy(
            settings,
            domains=names,
            utility=utility,
            bounds=bounds,
            proportional=proportional,
            ensemble=ensemble,
        )
    from megatron_mergemix.search.hierarchical import Hierarchical

    levels = levels_of(experiment, bounds)
    return Hierarchical(make_strategy, levels, utility, proportional, settings)
