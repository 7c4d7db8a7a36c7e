"""What the search of one experiment stands on: checkpoints, strategy, digests of everything.

No torch: the launching side asks here whether there is anything to do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_mergemix import __version__
from megatron_mergemix.checkpoint.checks import check_compatible, check_intact
from megatron_mergemix.checkpoint.fingerprint import fingerprint_of
from megatron_mergemix.checkpoint.metadata import read_index
from megatron_mergemix.config import Config
from megatron_mergemix.data.blend_files import current_blend, write_blend
from megatron_mergemix.errors import SearchError
from megatron_mergemix.evaluate.digests import capability_digests, objective
from megatron_mergemix.mixtures import simplex
from megatron_mergemix.mixtures.merge_weights import merge_weights
from megatron_mergemix.model_facts import model_facts
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.search.ensemble import Ensemble
from megatron_mergemix.search.ensemble_files import has_tokens, read_tokens
from megatron_mergemix.search.journal import Journal, changed_digests, read_journal
from megatron_mergemix.search.loop import MergeWeights
from megatron_mergemix.search.make import bounds_of, strategy_of
from megatron_mergemix.search.strategy import Strategy
from megatron_mergemix.training_runs.experiment_runs import base_checkpoint, expert_checkpoints
from megatron_mergemix.training_runs.mixtures import component_matrix, components, train_tokens
from megatron_mergemix.trials import Trial

_CHANGES_NO_NUMBER = {"resident", "replicas", "failures"}
"""Settings of the search that say where and by whom work is done, and when to give up."""


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
    if not path.exists():
        return
    trials = Journal(path, trial_digests(config)).trials()
    if _is_ensemble_there(config):  # else the search measures it anew before it looks
        make_strategy(config).tell(trials)


def _is_ensemble_there(config: Config) -> bool:
    """Return whether nothing of the experts' token probabilities is to be measured.

    Raises:
        SearchError: a file is damaged, or was measured on something else.
    """
    if not config.search.ensemble:
        return True
    digests = ensemble_digests(config)
    return all(has_tokens(path, digests[name]) for name, path in ensemble_paths(config).items())


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


def ensemble_digests(config: Config) -> dict[str, dict[str, str]]:
    """Return what every expert's token probabilities depend on, by name."""
    digests = trial_digests(config)
    shared = {n: d for n, d in digests.items() if n.startswith(("evaluate.", "model."))}
    if config.search.first_share < 1:  # which orders the windows
        shared["search.first_share"] = _plain([config.search.first_share, config.search.seed])
    return {n: {"expert": digests[f"expert.{n}"], **shared} for n in config.expert_names}


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


def search_result(config: Config) -> dict[str, Any] | None:
    """Return the result of this very search, or None when it has not ended yet."""
    path = RunDir(config.run_dir).result
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    return result if result["digests"] == search_digests(config) else None


def finished_search(config: Config) -> dict[str, Any]:
    """Return the result of this very search.

    Raises:
        SearchError: it has not ended yet, or what is there is of other settings; says which.
    """
    result = search_result(config)
    if result is None:
        raise SearchError(
            "there is no learned mixture for these settings yet. Run `mergemix search mix.yaml` "
            f"first.{_what_another_result_is_of(config)}"
        )
    return result


def _what_another_result_is_of(config: Config) -> str:
    """Return a sentence on the result that is there for other settings; empty without one."""
    path = RunDir(config.run_dir).result
    if not path.exists():
        return ""
    changed = changed_digests(json.loads(path.read_text())["digests"], search_digests(config))
    hint = ""
    if any(text.startswith("bounds:") for text in changed):
        hint = " The bounds depend on blend.train_tokens where a domain has max_epochs."
    return f" {path} is of other settings ({'; '.join(changed)}).{hint}"


def write_learned_blend(config: Config, result: Mapping[str, Any]) -> Path:
    """Write what the search recommends as Megatron blend files; return their folder.

    Raises:
        RunDirError: another process is at it.
    """
    run_dir = RunDir(config.run_dir)
    with run_dir.lock("blend"):
        return write_blend(
            run_dir.blend,
            result["mixture"],
            config,
            utility=result["utility"],
            utility_stderr=result["utility_stderr"],
            provenance={"source": result["source"], "digests": result["digests"]},
        )


def learned_blend(config: Config, result: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the ``blend.yaml`` of this very search and of today's datasets; None without one.

    Raises:
        MergeMixError: they could not be written today; says why.
    """
    written = current_blend(RunDir(config.run_dir).blend, result["mixture"], config)
    is_own = written is not None and written["provenance"]["digests"] == result["digests"]
    return written if is_own else None


def _plain(value: Any) -> str:
    """Return short settings as they are, so that a difference can be read, long ones hashed."""
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 200 else hashlib.sha256(text.encode()).hexdigest()
