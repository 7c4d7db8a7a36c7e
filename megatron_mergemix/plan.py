"""What an experiment will do and cost, found out before anything runs. No torch.

Making a plan checks everything that can be checked without a GPU: settings, datasets, checkpoint
folders, bounds, and whether the trials suffice for the surrogate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mergemix import simplex
from megatron_mergemix.checkpoint.metadata import read_index
from megatron_mergemix.checkpoint.saves import resolve
from megatron_mergemix.config import Config, load_config
from megatron_mergemix.config_files import PrefixCount, check_files
from megatron_mergemix.cost import (
    PAPER_COSTS,
    PAPER_FULL_RUNS,
    Parameters,
    count_parameters,
    forward_flops,
    training_flops,
)
from megatron_mergemix.data.blend import blend_of
from megatron_mergemix.evaluate.utility import Utility, objective_of
from megatron_mergemix.memory import (
    SearchMemory,
    TrainingMemory,
    search_memory,
    training_memory,
)
from megatron_mergemix.model_facts import is_known, model_facts, with_recorded_launch
from megatron_mergemix.search import make_strategy
from megatron_mergemix.training_runs import component_matrix, named_mixture, vocab_size

MANY_EPOCHS = 4.0
"""More passes over the same data teach clearly less (Muennighoff et al., arXiv 2305.16264)."""

EXTRA_EVALUATIONS = 3
"""Beside ``search.trials``: the base, and up to two candidates for the optimum."""


@dataclass(frozen=True)
class DomainPlan:
    """One domain.

    Attributes:
        name: of the domain.
        prefixes: its datasets with what they hold.
        documents: in all datasets.
        train_tokens: in the training part of ``blend.split``.
        proportional: share of all training tokens.
        expert_epochs: how often its own expert passes over it; None when experts are given.
        low: least share the search may recommend.
        high: largest share, also limited by ``max_epochs``.
    """

    name: str
    prefixes: Sequence[PrefixCount]
    documents: int
    train_tokens: int
    proportional: float
    expert_epochs: float | None
    low: float
    high: float


@dataclass(frozen=True)
class RunPlan:
    """One training run.

    Attributes:
        name: ``base``, ``experts/math``, ``references/uniform``.
        steps: optimizer steps; None before the first launch of Megatron-LM, which tells the batch.
        tokens: of all steps; at least what was asked for.
        epochs: largest number of passes over one dataset, None while the mixture is unknown.
        repeated: that dataset's prefix.
    """

    name: str
    steps: int | None
    tokens: int
    epochs: float | None
    repeated: str | None


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


@dataclass(frozen=True)
class Plan:
    """Everything that ``mergemix plan`` shows.

    Attributes:
        run_dir: where everything is written.
        domains: what there is to mix.
        components: expert -> its training mixture.
        general_share: of every component.
        runs: training runs that ``mergemix run`` makes when nothing is done yet.
        parameters: of the model section; of the base where a launch brings the model.
        base_parameters: of the base checkpoint; None when the base is trained here.
        costs: of the parts of this experiment.
        search_flops: of experts and search together, what the alternatives compare with.
        alternatives: other ways to find a mixture.
        training_memory: bytes on the fullest rank; None where a launch brings the model.
        search_memory: bytes on the fullest rank; None where a launch brings the model.
        warnings: one sentence each.
    """

    run_dir: Path
    domains: Sequence[DomainPlan]
    components: Mapping[str, Mapping[str, float]]
    general_share: float
    runs: Sequence[RunPlan]
    parameters: Parameters
    base_parameters: int | None
    costs: Sequence[Cost]
    search_flops: float
    alternatives: Sequence[Cost]
    training_memory: TrainingMemory | None
    search_memory: SearchMemory | None
    warnings: Sequence[str]


def make_plan(path: Path, overrides: Sequence[str] = ()) -> Plan:
    """Check the whole experiment and return what it will do.

    Raises:
        MergeMixError: something is wrong; the message lists it.
    """
    config = with_recorded_launch(load_config(path, overrides))
    return plan_of(config, check_files(config))


def plan_of(config: Config, counts: Mapping[str, Sequence[PrefixCount]]) -> Plan:
    """Return the plan of an experiment whose files are checked and counted."""
    tokens = {name: sum(count.train_tokens for count in counts[name]) for name in config.domains}
    bounds = simplex.mixture_bounds(config.domains, tokens, config.blend.train_tokens)
    make_strategy(  # refuses bounds and trials that cannot work
        config.search,
        domains=list(config.domains),
        utility=Utility(config.evaluate.utility, objective_of(config.evaluate)),
        bounds=bounds,
        proportional=simplex.proportional(tokens, list(config.domains)),
    )
    base_parameters = _base_parameters(config)
    parameters, training, search = _sizes(config, base_parameters)
    matrix = component_matrix(config)
    components = {
        name: simplex.to_mixture(row, list(config.domains))
        for name, row in zip(config.domains, matrix, strict=True)
    }
    runs = list(_runs(config, counts, components))
    costs = list(_costs(config, runs, parameters.active))
    return Plan(
        run_dir=config.run_dir,
        domains=_domains(counts, bounds, components, runs),
        components=components,
        general_share=config.experts.general_share,
        runs=runs,
        parameters=parameters,
        base_parameters=base_parameters,
        costs=costs,
        search_flops=sum(cost.flops for cost in costs if cost.what in ("experts", "search")),
        alternatives=list(_alternatives(config, parameters.active)),
        training_memory=training,
        search_memory=search,
        warnings=[
            *_many_epochs(runs),
            *_other_base(parameters, base_parameters),
            *_not_launched(config),
        ],
    )


def _sizes(
    config: Config, base: int | None
) -> tuple[Parameters, TrainingMemory | None, SearchMemory | None]:
    if config.model is None:
        assert base is not None, "a launch has a given base"
        return Parameters(base, base), None, None
    vocabulary = vocab_size(config)
    memory = training_memory(config, vocabulary), search_memory(config, vocabulary)
    return count_parameters(config.model, vocabulary), *memory


def _not_launched(config: Config) -> Iterator[str]:
    if config.launch.kind == "command":
        yield (
            "the model comes from your launch: cost counts every parameter of the base, also the "
            "MoE experts that a token does not pass; memory is that of your launch, in the search "
            "the weights of base and experts come on top."
        )
        if not is_known(config):
            yield "steps and the search's own cost are known after the first launch."


def _domains(
    counts: Mapping[str, Sequence[PrefixCount]],
    bounds: simplex.Bounds,
    components: Mapping[str, Mapping[str, float]],
    runs: Sequence[RunPlan],
) -> list[DomainPlan]:
    tokens = {name: sum(count.train_tokens for count in counts[name]) for name in counts}
    trained = {run.name: run.tokens for run in runs}
    domains = []
    for name, low, high in zip(counts, *bounds, strict=True):
        expert = trained.get(f"experts/{name}")
        domains.append(
            DomainPlan(
                name=name,
                prefixes=counts[name],
                documents=sum(count.documents for count in counts[name]),
                train_tokens=tokens[name],
                proportional=tokens[name] / sum(tokens.values()),
                expert_epochs=expert and components[name][name] * expert / tokens[name],
                low=float(low),
                high=float(high),
            )
        )
    return domains


def _runs(
    config: Config,
    counts: Mapping[str, Sequence[PrefixCount]],
    components: Mapping[str, Mapping[str, float]],
) -> Iterator[RunPlan]:
    base = config.base.train
    if base is not None:
        mixture = named_mixture(config, base.mixture)
        yield _run(config, counts, "base", base.tokens, mixture)
    if not config.experts.checkpoints:
        for name, row in components.items():
            yield _run(config, counts, f"experts/{name}", config.experts.tokens, row)
    for name, reference in config.references.items():
        known = None if reference == "learned" else named_mixture(config, reference)
        yield _run(config, counts, f"references/{name}", config.experts.tokens, known)


def _run(
    config: Config,
    counts: Mapping[str, Sequence[PrefixCount]],
    name: str,
    asked_tokens: float,
    mixture: Mapping[str, float] | None,
) -> RunPlan:
    steps, tokens = None, math.ceil(asked_tokens)
    if is_known(config):
        facts = model_facts(config)
        steps = facts.steps(asked_tokens)
        tokens = steps * facts.global_batch_size * facts.seq_length
    if mixture is None:
        return RunPlan(name, steps, tokens, None, None)
    held = {count.prefix: count.train_tokens for domain in counts.values() for count in domain}
    epochs, repeated = max(
        (weight * tokens / held[prefix], prefix)
        for weight, prefix in blend_of(mixture, config.domains, config.blend.split)
    )
    return RunPlan(name, steps, tokens, epochs, repeated)


def _costs(config: Config, runs: Sequence[RunPlan], active: int) -> Iterator[Cost]:
    for kind in ("base", "experts", "references"):
        tokens = [run.tokens for run in runs if run.name.split("/")[0] == kind]
        if tokens:
            yield Cost(kind, len(tokens), sum(tokens), training_flops(active, sum(tokens)))
        if kind == "experts" and is_known(config):
            yield _search_cost(config, active)


def _search_cost(config: Config, active: int) -> Cost:
    models = config.search.trials + EXTRA_EVALUATIONS
    sequences = sum(task.loss.sequences for task in config.evaluate.capabilities.values())
    tokens = models * sequences * model_facts(config).seq_length
    return Cost("search", models, tokens, forward_flops(active, tokens))


def _alternatives(config: Config, active: int) -> Iterator[Cost]:
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


def _base_parameters(config: Config) -> int | None:
    if config.base.checkpoint is None:
        return None
    return read_index(resolve(config.base.checkpoint)).num_parameters()


def _many_epochs(runs: Sequence[RunPlan]) -> Iterator[str]:
    for run in runs:
        if run.epochs is not None and run.epochs > MANY_EPOCHS:
            yield (
                f"{run.name} passes {run.epochs:.1f} times over {run.repeated}; more than "
                f"{MANY_EPOCHS:g} passes teach less. Lower its tokens or add data."
            )


def _other_base(parameters: Parameters, base: int | None) -> Iterator[str]:
    if base is not None and base != parameters.total:
        yield (
            f"the model section describes {parameters.total:,} parameters, base.checkpoint holds "
            f"{base:,}; the section must describe the model that was saved."
        )
