"""Models that ``mergemix evaluate`` scores: how they are named, made, and kept on record. No torch.

A word names a model: ``base``, ``expert:math``, ``mixture:uniform``, ``mixture:math=0.3,code=0.7``,
``alpha:math=0.5,code=0.5`` and ``checkpoint:FOLDER``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mergemix import __version__
from megatron_mergemix.checkpoint.fingerprint import fingerprint_of
from megatron_mergemix.checkpoint.saves import resolve
from megatron_mergemix.config import Config
from megatron_mergemix.config.mixtures import mixture_of
from megatron_mergemix.config.problems import suggestion
from megatron_mergemix.errors import ConfigError, SearchError
from megatron_mergemix.evaluate.digests import capability_digests
from megatron_mergemix.experiment.digests import model_digests
from megatron_mergemix.experiment.search_record import finished_search
from megatron_mergemix.experiment.strategy import merge_weights_of
from megatron_mergemix.files.publishing import publish_json
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.training_runs.experiment_runs import base_checkpoint, expert_checkpoints
from megatron_mergemix.training_runs.mixtures import named_mixture
from megatron_mergemix.trials import Scores, record_of


@dataclass(frozen=True)
class NamedModel:
    """One model that is scored: a checkpoint, or a merge of the experts.

    Attributes:
        name: for people, unique among those asked for.
        checkpoint: iteration folder, or None for a merge.
        merge_weights: expert -> weight, zeros left out; None for a checkpoint.
        mixture: share of tokens by domain that the merge stands for, where one was named.
    """

    name: str
    checkpoint: Path | None = None
    merge_weights: Mapping[str, float] | None = None
    mixture: Mapping[str, float] | None = None

    @property
    def file_name(self) -> str:
        """Return the name as it may stand in the name of a file."""
        return re.sub(r"[^A-Za-z0-9_.=-]+", "_", self.name)[-100:]


def asked_of(config: Config, word: str) -> NamedModel:
    """Return the model that a word names.

    Raises:
        ConfigError: it names none.
        SearchError: it is the learned mixture, and the search has not ended.
        CheckpointError: there is no checkpoint.
    """
    kind, _, what = word.partition(":")
    if word == "base":
        return NamedModel("base", base_checkpoint(config))
    if kind == "expert":
        if what not in config.expert_names:
            hint = suggestion(what, config.expert_names)
            raise ConfigError(f"{what!r} is no expert.{hint} There are {_list(config)}.")
        return NamedModel(f"expert {what}", expert_checkpoints(config)[what])
    if kind == "checkpoint":
        return NamedModel(what, resolve(Path(what)))
    if kind == "mixture":
        mixture = _mixture(config, what)
        alpha = merge_weights_of(config)(mixture)
        return NamedModel(f"mixture {what}", merge_weights=_used(alpha), mixture=mixture)
    if kind == "alpha":
        return NamedModel(f"alpha {what}", merge_weights=_used(_alpha(config, what)))
    raise ConfigError(  # `mergemix evaluate` has flags of their own for merges and checkpoints
        f"--mergemix-model is {word!r}, expected base, expert:NAME, mixture:..., alpha:... or "
        "checkpoint:FOLDER."
    )


def _mixture(config: Config, text: str) -> Mapping[str, float]:
    if "=" in text:
        return mixture_of(text, list(config.domains), "mixture")
    known = {"learned": "learned", "uniform": "uniform", "proportional": "proportional"}
    mixture = {**known, **config.references}.get(text)
    if mixture is None:
        names = dict.fromkeys([*known, *config.references])
        raise ConfigError(
            f"mixture is {text!r}, expected one of {', '.join(names)} or shares such as "
            "math=0.3,code=0.7."
        )
    if mixture != "learned":
        return named_mixture(config, mixture)
    return dict(finished_search(config)["mixture"])


def _alpha(config: Config, text: str) -> dict[str, float]:
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.strip().rpartition("=")
        if name not in config.expert_names or name in weights:
            what = "is there twice" if name in weights else "is no expert"
            raise ConfigError(f"alpha {text!r}: {name!r} {what}; there are {_list(config)}.")
        try:
            weights[name] = float(number)
        except ValueError:
            weights[name] = math.nan
        if not math.isfinite(weights[name]):
            raise ConfigError(f"alpha {text!r}: {number!r} is no finite number.")
    return weights


def _list(config: Config) -> str:
    return ", ".join(config.expert_names)


def _used(alpha: Mapping[str, float]) -> dict[str, float]:
    return {name: float(weight) for name, weight in alpha.items() if weight != 0.0}


# ---- on record ----


def evaluation_digests(config: Config, asked: NamedModel) -> dict[str, str]:
    """Return what the scores of a model depend on, by name."""
    if asked.checkpoint is not None:
        digests = {"checkpoint": fingerprint_of(asked.checkpoint)}
    else:
        experts = expert_checkpoints(config)
        digests = {"base": fingerprint_of(base_checkpoint(config))}
        for name, weight in (asked.merge_weights or {}).items():
            digests[f"expert.{name}"] = fingerprint_of(experts[name])
            digests[f"alpha.{name}"] = repr(weight)
    return {**digests, **model_digests(config), **capability_digests(config)}


def record_path(config: Config, digests: Mapping[str, str]) -> Path:
    """Return the file of the scores that depend on these."""
    text = json.dumps(digests, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    return RunDir(config.run_dir).evaluate / f"{name}.json"


def recorded(config: Config, asked: NamedModel) -> dict[str, Any] | None:
    """Return what is on record of a model, or None when it has to be scored."""
    path = record_path(config, evaluation_digests(config, asked))
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def publish_evaluation(
    config: Config, asked: NamedModel, digests: Mapping[str, str], scores: Scores, seconds: float
) -> Path:
    """Put the scores of a model on record; rank 0. Return the file.

    Args:
        config: the experiment.
        asked: the model.
        digests: what its scores depend on, taken before anything was scored.
        scores: what it scored.
        seconds: that the scoring took.

    Raises:
        SearchError: something that the scores depend on was changed meanwhile.
    """
    check_unchanged(asked.name, digests, evaluation_digests(config, asked))
    path = record_path(config, digests)
    publish_json(
        path,
        {
            "name": asked.name,
            "checkpoint": None if asked.checkpoint is None else str(asked.checkpoint),
            "merge_weights": None if asked.merge_weights is None else dict(asked.merge_weights),
            "mixture": None if asked.mixture is None else dict(asked.mixture),
            "scores": record_of(scores),
            "seconds": seconds,
            "digests": dict(digests),
            "version": __version__,
        },
    )
    return path


def check_unchanged(name: str, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Check that a model was scored by what is there now.

    Raises:
        SearchError: it was not; names the model and what was changed.
    """
    changed = [part for part in {**before, **now} if before.get(part) != now.get(part)]
    if changed:
        raise SearchError(
            f"the scores of {name} are not put on record: {', '.join(changed)} changed while it "
            "was scored, and nobody knows which of the two they are of. Leave datasets, programs "
            "and checkpoints alone and start it again."
        )
