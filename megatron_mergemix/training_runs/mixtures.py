"""What the runs of an experiment learn from: the mixtures of experts and references. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from megatron_mergemix.config import Config
from megatron_mergemix.data.blend import domain_tokens
from megatron_mergemix.errors import SearchError
from megatron_mergemix.mixtures import merge_weights, simplex
from megatron_mergemix.mixtures.components import check_components
from megatron_mergemix.run_dir import RunDir


def is_learned(config: Config, name: str) -> bool:
    """Return whether a run, by its whole name, is a reference model of the learned mixture."""
    kind, _, which = name.partition("/")
    return kind == "references" and config.references.get(which) == "learned"


def reference_mixture(config: Config, name: str) -> dict[str, float]:
    """Return the mixture of a reference model; ``learned`` is what the search recommends.

    Raises:
        SearchError: the learned mixture is asked for before the search has ended.
    """
    mixture = config.references[name]
    if mixture != "learned":
        return named_mixture(config, mixture)
    result = RunDir(config.run_dir).result
    if not result.exists():
        raise SearchError(
            f"the learned mixture is not there yet ({result} is missing). "
            "Run `mergemix search mix.yaml` first."
        )
    return named_mixture(config, json.loads(result.read_text())["mixture"])


def components(config: Config) -> dict[str, dict[str, float]]:
    """Return what every expert is trained on: its name -> share of training tokens per domain."""
    domains, rows = list(config.domains), component_matrix(config)
    named = zip(config.expert_names, rows, strict=True)
    return {name: simplex.to_mixture(row, domains) for name, row in named}


def component_matrix(config: Config) -> NDArray[np.float64]:
    """Return M ``[experts, domains]``: row k is the training mixture of expert k.

    Raises:
        ConfigError: some mixtures would need merge weights of an absurd size.
    """
    experts, domains, remedy = config.experts, list(config.domains), None
    if experts.components:
        mixtures = [named_mixture(config, row) for row in experts.components.values()]
        matrix = np.array([simplex.to_vector(mixture, domains) for mixture in mixtures])
    else:
        assert experts.general_share is not None, "checked when the YAML was loaded"
        assert experts.general_mixture is not None, "checked when the YAML was loaded"
        general = simplex.to_vector(named_mixture(config, experts.general_mixture), domains)
        matrix = merge_weights.component_matrix(len(domains), experts.general_share, general)
        remedy = "Lower experts.general_share."
    check_components(matrix, config.expert_names, domains, remedy)
    return matrix


def assumed_components(config: Config) -> str | None:
    """Return what is taken for granted of given experts, where nobody says what they learned."""
    experts = config.experts
    if not experts.checkpoints or {"general_share", "components"} & experts.model_fields_set:
        return None
    return (
        "experts.checkpoints: nothing says what they were trained on, which decides their merge "
        f"weights; taken is the default, experts.general_share: {experts.general_share:g} (of "
        f"{experts.general_mixture}). Set it, to 0 for experts of one domain each, or "
        "experts.components."
    )


def train_tokens(config: Config) -> dict[str, int]:
    """Return the tokens of every domain in the training part of ``blend.split``."""
    split = config.blend.split
    return {name: domain_tokens(domain, split) for name, domain in config.domains.items()}


def named_mixture(config: Config, mixture: str | Mapping[str, float]) -> dict[str, float]:
    """Return the mixture behind ``uniform`` or ``proportional``, or the given one, completed."""
    domains = list(config.domains)
    tokens = train_tokens(config) if mixture == "proportional" else {}
    return simplex.to_mixture(simplex.named_mixture(mixture, domains, tokens), domains)
