"""Which training runs an experiment consists of, and which of them are done.

A run is described by everything that decides its result: architecture, data, seeds, schedule and
the checkpoint it starts from, but neither the parallel layout nor where data lies. Its digest
tells a finished run from a stale one. No torch: the launching side asks here before it starts any
process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mergemix import run_seconds
from megatron_mergemix.checkpoint.fingerprint import fingerprint_of
from megatron_mergemix.checkpoint.saves import resolve
from megatron_mergemix.config import Config, Model
from megatron_mergemix.data.blend import blend_of, domain_tokens
from megatron_mergemix.data.indexed import IndexedDataset
from megatron_mergemix.data.tokenizers import load_tokenizer
from megatron_mergemix.errors import ConfigError, SearchError, TrainingError
from megatron_mergemix.files.publishing import publish_json
from megatron_mergemix.mixtures import merge_weights, simplex
from megatron_mergemix.mixtures.components import check_components
from megatron_mergemix.model_facts import is_known, model_facts, training_settings
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.run_saves import averaged_steps


@dataclass(frozen=True)
class TrainingRun:
    """One training run, by the built-in trainer or by a launch of the user's own.

    Attributes:
        name: ``"base"``, ``"experts/math"``, ``"references/uniform"``.
        directory: where its save, its description and its result go.
        mixture: share of training tokens per domain.
        blend: the mixture as weight and prefix pairs.
        steps: optimizer steps.
        lr: constant learning rate after ``warmup_steps``.
        seed: of initialisation and data order.
        start: iteration folder that the weights come from, or None for fresh weights.
        averaged_steps: the result is the mean of the saves of these steps, in order; the last
            one is ``steps``.
        description: everything that decides the result, as plain JSON values.
    """

    name: str
    directory: Path
    mixture: Mapping[str, float]
    blend: tuple[tuple[float, str], ...]
    steps: int
    lr: float
    warmup_steps: int
    seed: int
    start: Path | None
    averaged_steps: tuple[int, ...]
    description: Mapping[str, Any]

    @property
    def checkpoints(self) -> Path:
        """Return the checkpoint root, usable as Megatron's ``--load``."""
        return self.directory / "checkpoints"

    def digest(self) -> str:
        """Return the SHA-256 of the description."""
        text = json.dumps(self.description, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def is_finished(self) -> bool:
        """Return whether this very run is done.

        Raises:
            TrainingError: the directory holds another run; says what differs.
        """
        started = self.directory / "run.json"
        if not started.exists():
            return False
        before = json.loads(started.read_text())
        now = json.loads(json.dumps(self.description))
        if before["description"] != now:
            prefixes = [prefix for _, prefix in self.blend]
            what = _difference(_named(before["description"], prefixes), _named(now, prefixes))
            raise TrainingError(
                f"{self.directory} holds another run: {what}. Choose another run_dir, "
                f"or remove {self.directory} to train again."
            )
        return (self.directory / "finished.json").exists()

    def mark_started(self) -> None:
        """Make the folders, write ``run.json`` and note that the run works from now on."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        publish_json(
            self.directory / "run.json",
            {"digest": self.digest(), "description": self.description},
        )
        run_seconds.begin(self.directory)

    def mark_finished(self, result: Mapping[str, Any]) -> None:
        """Write ``finished.json``, which makes the run count as done, with its wall seconds."""
        seconds = run_seconds.worked(self.directory)
        finished = {"digest": self.digest(), **result, "seconds": seconds}
        publish_json(self.directory / "finished.json", finished)

    def final_checkpoint(self) -> Path:
        """Return the iteration folder that the run ended with.

        Raises:
            TrainingError: the run is not finished, or the directory holds another run.
        """
        path = self.directory / "finished.json"
        if not self.is_finished():
            raise TrainingError(
                f"{self.name} is not trained yet ({self.directory} has no finished.json). "
                f"Run `mergemix train mix.yaml {self.name.replace('s/', ':')}` first."
            )
        return resolve(self.directory / json.loads(path.read_text())["checkpoint"])


def base_run(config: Config) -> TrainingRun | None:
    """Return the run that trains the base, or None when the base is a given checkpoint."""
    settings = config.base.train
    if settings is None:
        return None
    return _run(
        config,
        name="base",
        directory=RunDir(config.run_dir).base,
        mixture=named_mixture(config, settings.mixture),
        tokens=settings.tokens,
        lr=settings.lr,
        warmup_steps=settings.warmup_steps,
        seed=settings.seed,
        start=None,
    )


def base_checkpoint(config: Config) -> Path:
    """Return the iteration folder of the base, given or trained.

    Raises:
        TrainingError: it is not trained yet.
    """
    if config.base.checkpoint is not None:
        return resolve(config.base.checkpoint)
    run = base_run(config)
    assert run is not None
    return run.final_checkpoint()


def expert_run(config: Config, expert: str) -> TrainingRun:
    """Return the run that trains one expert; needs the base."""
    return _budgeted_run(
        config,
        name=f"experts/{expert}",
        directory=RunDir(config.run_dir).expert(expert),
        mixture=components(config)[expert],
    )


def expert_checkpoints(config: Config) -> dict[str, Path]:
    """Return the iteration folder of every expert by its name, given or trained.

    Raises:
        TrainingError: one is not trained yet.
    """
    given = config.experts.checkpoints
    if given:
        return {name: resolve(given[name]) for name in config.expert_names}
    return {name: expert_run(config, name).final_checkpoint() for name in config.expert_names}


def reference_run(config: Config, name: str, mixture: Mapping[str, float]) -> TrainingRun:
    """Return the run that really trains ``mixture``, as experts are trained; needs the base."""
    return _budgeted_run(
        config,
        name=f"references/{name}",
        directory=RunDir(config.run_dir).reference(name),
        mixture=mixture,
    )


def is_trained(config: Config, name: str) -> bool:
    """Return whether a run is done; before the first launch nobody knows what it would be."""
    return is_known(config) and requested_run(config, name).is_finished()


def requested_run(config: Config, name: str) -> TrainingRun:
    """Return the run called ``base``, ``experts/NAME`` or ``references/NAME``.

    Raises:
        ConfigError: there is no such run in this experiment.
        TrainingError: what it starts from is not there yet.
    """
    kind, _, which = name.partition("/")
    if kind == "base":
        run = base_run(config)
        if run is None:
            raise ConfigError("base is given by base.checkpoint; there is nothing to train.")
        return run
    known: dict[str, Collection[str]] = {
        "experts": config.expert_names,
        "references": config.references,
    }
    if which not in known.get(kind, ()):
        names = [*(f"experts/{e}" for e in config.expert_names)]
        names += [f"references/{r}" for r in config.references]
        raise ConfigError(f"no run is called {name!r}; there are base, {', '.join(names)}.")
    if kind == "experts":
        if config.experts.checkpoints:
            raise ConfigError(
                "experts are given by experts.checkpoints; there is nothing to train."
            )
        return expert_run(config, which)
    return reference_run(config, which, reference_mixture(config, which))


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


def train_tokens(config: Config) -> dict[str, int]:
    """Return the tokens of every domain in the training part of ``blend.split``."""
    split = config.blend.split
    return {name: domain_tokens(domain, split) for name, domain in config.domains.items()}


def named_mixture(config: Config, mixture: str | Mapping[str, float]) -> dict[str, float]:
    """Return the mixture behind ``uniform`` or ``proportional``, or the given one, completed."""
    domains = list(config.domains)
    tokens = train_tokens(config) if mixture == "proportional" else {}
    return simplex.to_mixture(simplex.named_mixture(mixture, domains, tokens), domains)


def _budgeted_run(
    config: Config,
    *,
    name: str,
    directory: Path,
    mixture: Mapping[str, float],
) -> TrainingRun:
    experts = config.experts
    return _run(
        config,
        name=name,
        directory=directory,
        mixture=mixture,
        tokens=experts.tokens,
        lr=experts.lr,
        warmup_steps=experts.warmup_steps,
        seed=experts.seed,
        start=base_checkpoint(config),
        average_last=experts.average_last,
    )


def _run(
    config: Config,
    *,
    name: str,
    directory: Path,
    mixture: Mapping[str, float],
    tokens: float,
    lr: float,
    warmup_steps: int,
    seed: int,
    start: Path | None,
    average_last: int | None = 1,
) -> TrainingRun:
    settings = training_settings(config)
    blend = tuple(blend_of(mixture, config.domains, config.blend.split))
    steps = model_facts(config).steps(tokens)
    training = dict(settings["training"])
    # Saves may be anywhere, but for those whose mean is the result.
    averaged = averaged_steps(steps, training.pop("save_interval"), average_last)
    description = {
        **settings,
        "training": training,
        "blend": [
            {"weight": weight, "data": IndexedDataset(prefix).fingerprint()}
            for weight, prefix in blend
        ],
        "split": config.blend.split,
        "steps": steps,
        "lr": lr,
        "warmup_steps": warmup_steps,
        "seed": seed,
        "start": fingerprint_of(start) if start is not None else None,
        "averaged_steps": list(averaged) if len(averaged) > 1 else None,
    }
    return TrainingRun(
        name=name,
        directory=directory,
        mixture=dict(mixture),
        blend=blend,
        steps=steps,
        lr=lr,
        warmup_steps=warmup_steps,
        seed=seed,
        start=start,
        averaged_steps=averaged,
        description=description,
    )


def vocab_size(config: Config) -> int:
    """Return the vocabulary size before padding: the model section's, else the tokenizer's."""
    model: Model | None = config.model
    if model is not None and model.vocab_size is not None:
        return model.vocab_size
    return load_tokenizer(config.tokenizer).vocab_size


def _named(description: Mapping[str, Any], prefixes: Sequence[str]) -> dict[str, Any]:
    """Return a description whose datasets have names, so that a difference can be read."""
    blend = description.get("blend")
    if not isinstance(blend, list) or len(blend) != len(prefixes):
        return dict(description)
    return {**description, "blend": dict(zip(prefixes, blend, strict=True))}


def _difference(before: Any, now: Any) -> str:
    """Return the first few entries in which two descriptions differ, as ``key: old -> new``."""
    found: list[str] = []

    def walk(old: Any, new: Any, where: str) -> None:
        if isinstance(old, dict) and isinstance(new, dict):
            for key in sorted(set(old) | set(new)):
                walk(old.get(key), new.get(key), f"{where}.{key}" if where else key)
        elif old != new:
            found.append(f"{where}: {_short(old)} -> {_short(new)}")

    walk(before, now, "")
    more = f", and {len(found) - 4} more" if len(found) > 4 else ""
    return ", ".join(found[:4]) + more


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
