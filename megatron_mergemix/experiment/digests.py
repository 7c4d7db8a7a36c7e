"""What a search stands on: digests of checkpoints, data and settings. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from megatron_mergemix import __version__
from megatron_mergemix.checkpoint.fingerprint import fingerprint_of
from megatron_mergemix.config import Config
from megatron_mergemix.evaluate.digests import capability_digests
from megatron_mergemix.mixtures import simplex
from megatron_mergemix.model_facts import model_facts
from megatron_mergemix.search.make import bounds_of
from megatron_mergemix.training_runs.experiment_runs import base_checkpoint, expert_checkpoints
from megatron_mergemix.training_runs.mixtures import components, train_tokens

_CHANGES_NO_NUMBER = {"resident", "replicas", "failures"}
"""Settings of the search that say where and by whom work is done, and when to give up."""


def ensemble_digests(config: Config) -> dict[str, dict[str, str]]:
    """Return what every expert's token probabilities depend on, by name."""
    digests = trial_digests(config)
    shared = {n: d for n, d in digests.items() if n.startswith(("evaluate.", "model."))}
    if config.search.first_share < 1:  # which orders the windows
        shared["search.first_share"] = _plain([config.search.first_share, config.search.seed])
    return {n: {"expert": digests[f"expert.{n}"], **shared} for n in config.expert_names}


def trial_digests(config: Config) -> dict[str, str]:
    """Return what a trial depends on: its scores, and by strategy and seed why it was asked for.

    A search goes on only with the same digests. The parallel layout is not among them, nor are
    other settings of the search: the strategy refuses trials it did not plan.
    """
    digests = checkpoint_digests(config)
    for name, mixture in components(config).items():
        row = {domain: round(share, 12) for domain, share in mixture.items() if share != 0}
        digests[f"component.{name}"] = _plain(row)
    digests |= capability_digests(config)
    digests |= {"search.strategy": config.search.strategy, "search.seed": str(config.search.seed)}
    return {**digests, **model_digests(config)}


def checkpoint_digests(config: Config) -> dict[str, str]:
    """Return the fingerprints of base and experts, ``base`` and ``expert.NAME``.

    Raises:
        CheckpointError: one of them cannot be read.
        TrainingError: one of them is not trained yet.
    """
    digests = {"base": fingerprint_of(base_checkpoint(config))}
    for name, path in expert_checkpoints(config).items():
        digests[f"expert.{name}"] = fingerprint_of(path)
    return digests


def of_checkpoints(digests: Mapping[str, str]) -> dict[str, str]:
    """Return those of some digests that are of base and experts."""
    return {n: text for n, text in digests.items() if n == "base" or n.startswith("expert.")}


def model_digests(config: Config) -> dict[str, str]:
    """Return every setting of the model that a checkpoint's scores depend on, by name."""
    settings = model_facts(config).scoring
    return {f"model.{name}": _plain(value) for name, value in settings.items()}


def search_digests(config: Config) -> dict[str, str]:
    """Return everything that the result of the search depends on, by name."""
    settings = settings_digests(config, train_tokens(config))
    return {**trial_digests(config), **settings, "code": __version__}


def settings_digests(config: Config, tokens: Mapping[str, float] | None) -> dict[str, str]:
    """Return what the result of the search depends on besides its trials; opens no checkpoint.

    Args:
        config: the experiment.
        tokens: of every domain, for training. None where they are not counted: bounds and the
            proportional mixture, which depend on them, are left out.

    Raises:
        ConfigError: no mixture is within the bounds.
    """
    digests = {
        "search": _plain(_search_settings(config)),
        "utility": _plain(config.evaluate.utility.model_dump(mode="json")),
        "held_out": _plain(config.evaluate.held_out),
    }
    if tokens is not None:
        bounds = bounds_of(config, tokens)
        digests["bounds"] = _plain([bounds.low.tolist(), bounds.high.tolist()])
        shares = simplex.proportional(tokens, list(config.domains))
        digests["proportional"] = _plain([round(float(share), 12) for share in shares])
    if config.search.hierarchy is not None:
        groups = {name: group.model_dump(mode="json") for name, group in config.groups.items()}
        digests["groups"] = _plain(groups)
    return digests


def _search_settings(config: Config) -> dict[str, Any]:
    """Return the settings of the search that change numbers, defaults of rare ones left out."""
    search = config.search
    dumped = search.model_dump(mode="json", exclude=_CHANGES_NO_NUMBER)
    default = type(search)().model_dump(mode="json")
    shown = ("strategy", "trials", "surrogate", "top_k", "seed")
    return {name: v for name, v in dumped.items() if name in shown or v != default[name]}


def _plain(value: Any) -> str:
    """Return short settings as they are, so that a difference can be read, long ones hashed."""
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 200 else hashlib.sha256(text.encode()).hexdigest()
