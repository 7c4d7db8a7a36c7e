"""What the search of one experiment stands on: checkpoints, strategy, digests of everything.

No torch: the launching side asks here whether there is anything to do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mergemix import __version__, search, simplex
from megatron_mergemix.checkpoint.checks import check_compatible, check_intact
from megatron_mergemix.checkpoint.fingerprint import fingerprint_of
from megatron_mergemix.checkpoint.metadata import read_index
from megatron_mergemix.config import Config
from megatron_mergemix.data.blend import write_blend
from megatron_mergemix.errors import SearchError
from megatron_mergemix.evaluate.utility import Utility, objective_of
from megatron_mergemix.evaluate.windows import loss_digest
from megatron_mergemix.journal import Journal, Trial, read_journal
from megatron_mergemix.model_facts import model_facts
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.search.strategy import Strategy
from megatron_mergemix.training_runs import (
    base_checkpoint,
    component_matrix,
    expert_checkpoints,
    train_tokens,
)


def check_checkpoints(config: Config) -> None:
    """Check that base and experts are whole and fit each other, without reading any weights.

    Raises:
        CheckpointError: a file is missing or truncated, or names, shapes or dtypes differ.
    """
    base = read_index(base_checkpoint(config))
    experts = {name: read_index(path) for name, path in expert_checkpoints(config).items()}
    for index in (base, *experts.values()):
        check_intact(index)
    check_compatible(base, experts)


def check_journal(config: Config) -> None:
    """Check that a search that was begun can be continued, before any process is started.

    Raises:
        SearchError: the journal is damaged, or its trials were measured on something else.
    """
    path = RunDir(config.run_dir).trials
    if path.exists():
        make_strategy(config).tell(Journal(path, trial_digests(config)).trials())


def make_strategy(config: Config) -> Strategy:
    """Return the strategy of this experiment, before it has seen any trial.

    Raises:
        ConfigError: bounds, utility or number of trials do not fit the domains.
    """
    tokens = train_tokens(config)
    domains = list(config.domains)
    return search.make_strategy(
        config.search,
        domains=domains,
        utility=Utility(config.evaluate.utility, objective_of(config.evaluate)),
        bounds=simplex.mixture_bounds(config.domains, tokens, config.blend.train_tokens),
        proportional=simplex.proportional(tokens, domains),
    )


def measured_trials(config: Config) -> list[Trial]:
    """Return the trials of this search, without opening its journal for writing.

    Raises:
        SearchError: there is no journal, it is damaged, or its trials were measured on something
            else.
    """
    path = RunDir(config.run_dir).trials
    digests, trials = read_journal(path)
    if digests != trial_digests(config):
        raise SearchError(
            f"the trials in {path} were measured on something else than these settings name. "
            "Run `mergemix search mix.yaml`: it says what differs."
        )
    return trials


def trial_digests(config: Config) -> dict[str, str]:
    """Return everything that the scores of a trial depend on besides its mixture, by name.

    A search goes on only with the same digests. The parallel layout is not among them, nor is
    what merely decides which mixtures are asked for: the strategy refuses trials it did not plan.
    """
    seq_length = model_facts(config).seq_length
    digests = {"base": fingerprint_of(base_checkpoint(config))}
    for name, path in expert_checkpoints(config).items():
        digests[f"expert.{name}"] = fingerprint_of(path)
    for name, capability in config.evaluate.capabilities.items():
        digests[f"evaluate.{name}"] = loss_digest(capability.loss, seq_length)
    return {
        **digests,
        **model_digests(config),
        "components": _plain(np.round(component_matrix(config), 12).tolist()),
    }


def model_digests(config: Config) -> dict[str, str]:
    """Return every setting of the model that a checkpoint's scores depend on, by name."""
    settings = model_facts(config).scoring
    return {f"model.{name}": _plain(value) for name, value in settings.items()}


def search_digests(config: Config) -> dict[str, str]:
    """Return everything that the result of the search depends on, by name."""
    bounds = simplex.mixture_bounds(config.domains, train_tokens(config), config.blend.train_tokens)
    return {
        **trial_digests(config),
        "search": _plain(config.search.model_dump(mode="json")),
        "utility": _plain(config.evaluate.utility.model_dump(mode="json")),
        "bounds": _plain([bounds.low.tolist(), bounds.high.tolist()]),
        "code": __version__,
    }


def search_result(config: Config) -> dict[str, Any] | None:
    """Return the result of this very search, or None when it has not ended yet."""
    path = RunDir(config.run_dir).result
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    return result if result["digests"] == search_digests(config) else None


def write_learned_blend(config: Config, result: Mapping[str, Any]) -> Path:
    """Write what the search recommends as Megatron blend files; return their folder."""
    return write_blend(
        RunDir(config.run_dir).blend,
        result["mixture"],
        config,
        utility=result["utility"],
        utility_stderr=result["utility_stderr"],
        provenance={"source": result["source"], "digests": result["digests"]},
    )


def _plain(value: Any) -> str:
    """Return short settings as they are, so that a difference can be read, long ones hashed."""
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 200 else hashlib.sha256(text.encode()).hexdigest()
