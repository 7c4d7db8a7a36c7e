"""Which training runs an experiment consists of: base, experts and reference models.

No torch: the launching side asks here before it starts any process.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from megatron_mergemix.checkpoint.fingerprint import fingerprint_of
from megatron_mergemix.checkpoint.saves import resolve
from megatron_mergemix.config import Config
from megatron_mergemix.data.blend import blend_of
from megatron_mergemix.data.indexed import IndexedDataset
from megatron_mergemix.errors import ConfigError
from megatron_mergemix.model_facts import is_known, model_facts, training_settings
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.training_runs.mixtures import components, named_mixture, reference_mixture
from megatron_mergemix.training_runs.run import TrainingRun
from megatron_mergemix.training_runs.saves import averaged_steps


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
