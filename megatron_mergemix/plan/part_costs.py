"""What each part of an experiment costs, and what other ways to a mixture cost."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_mergemix.config import Config
from megatron_mergemix.evaluate.windows import held_out_count
from megatron_mergemix.mixtures.simplex import Bounds
from megatron_mergemix.model_facts import is_known, model_facts
from megatron_mergemix.plan.cost import (
    PAPER_COSTS,
    PAPER_FULL_RUNS,
    forward_flops,
    training_flops,
)
from megatron_mergemix.plan.runs import RunPlan
from megatron_mergemix.search.budgets import stage_budgets
from megatron_mergemix.search.held_out import OTHERS

SCORED = ("ensemble", "search")
"""The parts until a mixture is recommended that score models."""

OF_A_SEARCH = ("experts", *SCORED)
"""The parts that other ways to a mixture compare with."""


@dataclass(frozen=True)
class Cost:
    """What one part of the experiment, or an alternative to it, costs.

    Attributes:
        what: the part.
        runs: training runs, or scored models.
        tokens: of all runs.
        flops: of all runs.
        source: ``settings``, or where the numbers are from.
    """

    what: str
    runs: int
    tokens: float
    flops: float
    source: str = "settings"


def part_costs(
    config: Config, runs: Sequence[RunPlan], bounds: Bounds, active: int
) -> Iterator[Cost]:
    """Yield what every part costs, in the order of the work.

    Args:
        config: the experiment.
        runs: that are trained when nothing is done yet.
        bounds: of its mixtures, as far as known.
        active: parameters that a token passes.
    """
    for kind in ("base", "experts", "references"):
        tokens = [run.tokens for run in runs if run.name.split("/")[0] == kind]
        if tokens:
            yield Cost(kind, len(tokens), sum(tokens), training_flops(active, sum(tokens)))
        if kind == "experts" and is_known(config):
            yield from _scoring_costs(config, bounds, active)


def _scoring_costs(config: Config, bounds: Bounds, active: int) -> Iterator[Cost]:
    windows, held_out = windows_of(config), _held_out_windows(config)
    experts = len(config.expert_names)
    if config.search.ensemble:
        yield _scoring("ensemble", config, active, experts, windows)
    yield _scoring("search", config, active, models_of_search(config), windows)
    if held_out:
        yield _scoring("held-out check", config, active, 2 + len(OTHERS), held_out)
    if windows and (models := experts_alone(config, bounds)):
        yield _scoring("experts alone", config, active, models, windows)


def _scoring(what: str, config: Config, active: int, models: int, windows: int) -> Cost:
    tokens = models * windows * model_facts(config).seq_length
    return Cost(what, models, tokens, forward_flops(active, tokens))


def windows_of(config: Config) -> int:
    """Return the held-out windows that one model is scored on."""
    return sum(task.sequences for task in config.evaluate.losses.values())


def _held_out_windows(config: Config) -> int:
    """Return the windows that the search never sees, on which its gain is checked at the end."""
    share = config.evaluate.held_out
    return sum(held_out_count(task, share) for task in config.evaluate.losses.values())


def models_of_search(config: Config) -> int:
    """Return the most models that the search scores."""
    return sum(stage.models for stage in stage_budgets(config))


def experts_alone(config: Config, bounds: Bounds) -> int:
    """Return how many experts are scored by themselves after the search: those that are no trial.

    With a general share none is, and without one those of the domains that a mixture may not be
    of alone; from the top no domain of a group is alone.
    """
    if config.experts.general_share != 0.0:
        return len(config.expert_names)
    names = {name for name, high in zip(config.domains, bounds.high, strict=True) if high < 1}
    if config.search.hierarchy == "top_down":
        groups = config.leaves_by_group().values()
        names |= {name for leaves in groups if len(leaves) > 1 for name in leaves}
    return len(names)


def command_hours(config: Config, models: int) -> float:
    """Return what the commands of so many models take at most, by their timeouts.

    Those of one model run beside each other, as they become free; models follow each other.
    """
    busy = [0.0] * config.evaluate.commands_at_once
    for task in config.evaluate.commands.values():
        heapq.heapreplace(busy, busy[0] + task.timeout)
    return models * max(busy) / 3600


def alternatives(config: Config, active: int) -> Iterator[Cost]:
    """Yield what other ways to a mixture cost."""
    if config.search.hierarchy is not None and not config.experts.checkpoints:
        groups = len(config.leaves_by_group())
        tokens = groups * config.experts.tokens
        yield Cost(
            "one expert per group, no search inside",
            groups,
            tokens,
            training_flops(active, tokens),
            "the main search of the MergeMix paper, this model, experts.tokens",
        )
    if config.blend.train_tokens is not None:
        tokens = PAPER_FULL_RUNS * config.blend.train_tokens
        yield Cost(
            "full runs (manual search, adapted RegMix)",
            PAPER_FULL_RUNS,
            tokens,
            training_flops(active, tokens),
            "number of runs of the MergeMix paper, this model, blend.train_tokens",
        )
    for row in PAPER_COSTS:
        yield Cost(
            f"{row.method}, {row.parameters / 1e9:g}B parameters",
            row.runs,
            row.runs * row.tokens,
            row.flops,
            "MergeMix paper (arXiv 2601.17858), Table 6",
        )
