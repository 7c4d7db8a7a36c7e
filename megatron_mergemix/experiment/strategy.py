"""The strategy of an experiment, and what it needs of the experts. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_mergemix.config import Config
from megatron_mergemix.evaluate.digests import objective
from megatron_mergemix.experiment.digests import ensemble_digests
from megatron_mergemix.mixtures import simplex
from megatron_mergemix.mixtures.merge_weights import merge_weights
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.search.ensemble import Ensemble
from megatron_mergemix.search.ensemble_files import read_tokens
from megatron_mergemix.search.make import strategy_of
from megatron_mergemix.search.slopes import MergeWeights
from megatron_mergemix.search.strategy import Strategy
from megatron_mergemix.training_runs.mixtures import component_matrix, train_tokens


def make_strategy(config: Config) -> Strategy:
    """Return the strategy of this experiment, before it has seen any trial.

    Raises:
        ConfigError: bounds, utility or number of trials do not fit the domains.
    """
    ensemble = expert_ensemble(config) if config.search.ensemble else None
    return strategy_of(config, train_tokens(config), ensemble, objective(config))


def expert_ensemble(config: Config) -> Ensemble:
    """Return what the experts' token probabilities predict; read when it is first asked."""
    paths = ensemble_paths(config)
    return Ensemble(component_matrix(config), lambda: read_tokens(paths, ensemble_digests(config)))


def ensemble_paths(config: Config) -> dict[str, Path]:
    """Return the file of every expert's token probabilities, in the order of the experts."""
    run_dir = RunDir(config.run_dir)
    return {name: run_dir.expert_tokens(name) for name in config.expert_names}


def merge_weights_of(config: Config) -> MergeWeights:
    """Return what turns a mixture over domains into merge weights by expert.

    The search variable is the mixture (lambda): ``alpha = lambda @ inv(M)``, and with more experts
    than domains those of least norm. The base, an empty mixture, has zeros.
    """
    matrix = component_matrix(config)
    domains, experts = list(config.domains), config.expert_names

    def by_expert(mixture: Mapping[str, float]) -> Mapping[str, float]:
        if not mixture:
            return dict.fromkeys(experts, 0.0)
        alpha = merge_weights(simplex.to_vector(mixture, domains), matrix)
        return simplex.to_mixture(alpha, experts)

    return by_expert
