"""The training runs of a plan: steps, epochs, and how many saves each ends with. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_mergemix.config import Config
from megatron_mergemix.data.blend import blend_of
from megatron_mergemix.model_facts import is_known, model_facts
from megatron_mergemix.plan.domains import Components, Counts
from megatron_mergemix.training_runs.mixtures import named_mixture
from megatron_mergemix.training_runs.saves import averaged_steps

MANY_EPOCHS = 4.0
"""More passes over the same data teach clearly less (Muennighoff et al., arXiv 2305.16264)."""


@dataclass(frozen=True)
class RunPlan:
    """One training run.

    Attributes:
        name: ``base``, ``experts/math``, ``references/uniform``.
        steps: optimizer steps; None before the first launch of Megatron-LM, which tells the batch.
        averaged: saves whose mean is the result; None as ``steps``.
        tokens: of all steps; at least what was asked for.
        epochs: largest number of passes over one dataset, None while the mixture is unknown.
        repeated: that dataset's prefix.
    """

    name: str
    steps: int | None
    averaged: int | None
    tokens: int
    epochs: float | None
    repeated: str | None


def plan_runs(config: Config, counts: Counts | None, components: Components) -> Iterator[RunPlan]:
    """Yield the base if it is trained, the experts that are, and the reference models."""
    base = config.base.train
    if base is not None:
        mixture = None if counts is None else named_mixture(config, base.mixture)
        yield _run(config, counts, "base", base.tokens, mixture)
    if not config.experts.checkpoints:
        for name, row in components.items():
            yield _run(config, counts, f"experts/{name}", config.experts.tokens, row)
    for name, reference in config.references.items():
        unknown = reference == "learned" or counts is None
        known = None if unknown else named_mixture(config, reference)
        yield _run(config, counts, f"references/{name}", config.experts.tokens, known)


def _run(
    config: Config,
    counts: Counts | None,
    name: str,
    asked_tokens: float,
    mixture: Mapping[str, float] | None,
) -> RunPlan:
    steps, averaged, tokens = None, None, math.ceil(asked_tokens)
    if is_known(config):
        facts = model_facts(config)
        steps = facts.steps(asked_tokens)
        last = 1 if name == "base" else config.experts.average_last
        averaged = len(averaged_steps(steps, facts.training["training"]["save_interval"], last))
        tokens = steps * facts.global_batch_size * facts.seq_length
    if mixture is None or counts is None:
        return RunPlan(name, steps, averaged, tokens, None, None)
    held = {count.prefix: count.train_tokens for domain in counts.values() for count in domain}
    epochs, repeated = max(
        (weight * tokens / held[prefix], prefix)
        for weight, prefix in blend_of(mixture, config.domains, config.blend.split)
    )
    return RunPlan(name, steps, averaged, tokens, epochs, repeated)


def many_epochs(runs: Sequence[RunPlan]) -> Iterator[str]:
    """Yield a warning for every run that repeats a dataset often."""
    for run in runs:
        if run.epochs is not None and run.epochs > MANY_EPOCHS:
            yield (
                f"{run.name} passes {run.epochs:.1f} times over {run.repeated}; more than "
                f"{MANY_EPOCHS:g} passes teach less. Lower its tokens or add data."
            )


def not_averaged(config: Config, runs: Sequence[RunPlan]) -> Iterator[str]:
    """Yield a warning where experts would be means of saves, but end with one save alone."""
    expert = next((run for run in runs if run.name.startswith("experts/")), None)
    if config.experts.average_last is None and expert is not None and expert.averaged == 1:
        assert expert.steps is not None, "where the saves are known"
        yield (
            f"an expert ends with its last save alone: no other lies in the last third of its "
            f"{expert.steps:,} steps. The mean of several has less of the noise of training; make "
            f"training.save_interval, or --save-interval of a launch, {max(1, expert.steps // 9):,}"
            " or less. experts.average_last: 1 says that one save is meant."
        )
