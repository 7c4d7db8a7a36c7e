"""What an experiment will do and cost, found out before anything runs. No torch.

Making a plan checks everything that can be checked without a GPU: settings, datasets, checkpoint
folders, bounds, and whether the trials suffice for the surrogate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mergemix.checkpoint.metadata import read_index
from megatron_mergemix.checkpoint.saves import resolve
from megatron_mergemix.config import Config, load_config
from megatron_mergemix.config.validation import too_few_to_rank
from megatron_mergemix.diagnosis.regime import of_training
from megatron_mergemix.errors import ConfigError
from megatron_mergemix.evaluate.lm_eval_tasks import check_tasks
from megatron_mergemix.experiment.named_files import check_files
from megatron_mergemix.mixtures.components import Amplification, noise_notes
from megatron_mergemix.mixtures.simplex import Bounds
from megatron_mergemix.model_facts import is_known, vocab_size, with_recorded_launch
from megatron_mergemix.plan.cost import Parameters, count_parameters
from megatron_mergemix.plan.domains import (
    Components,
    Counts,
    DomainPlan,
    amplification_of,
    components_of,
    plan_domains,
    tokens_of,
)
from megatron_mergemix.plan.memory import (
    SearchMemory,
    TrainingMemory,
    search_memory,
    training_memory,
)
from megatron_mergemix.plan.outlook import Hardware, Outlook, does_not_fit, make_outlook
from megatron_mergemix.plan.part_costs import (
    OF_A_SEARCH,
    SCORED,
    Cost,
    alternatives,
    command_hours,
    experts_alone,
    models_of_search,
    part_costs,
    windows_of,
)
from megatron_mergemix.plan.runs import RunPlan, many_epochs, not_averaged, plan_runs
from megatron_mergemix.plan.task_vectors import TaskVectors, task_vectors_on_record
from megatron_mergemix.search.budgets import StageBudget, stage_budgets
from megatron_mergemix.search.make import bounds_of, strategy_of
from megatron_mergemix.training_runs.mixtures import assumed_components, component_matrix


@dataclass(frozen=True)
class Plan:
    """Everything that ``mergemix plan`` shows.

    Attributes:
        run_dir: where everything is written.
        domains: what there is to mix.
        components: what the experts are trained on.
        general_share: of every component; None where ``experts.components`` gives them.
        amplification: norms of merge weights, by which the noise of experts enters the search;
            None while components depend on data that were not counted.
        stages: of the search, with the most models that each scores.
        runs: training runs that ``mergemix run`` makes when nothing is done yet.
        parameters: of the model section; of the base where a launch brings the model.
        base_parameters: of the base checkpoint; None when the base is trained here.
        costs: of the parts of this experiment.
        search_flops: of experts and search together, what the alternatives compare with.
        alternatives: other ways to find a mixture.
        training_memory: bytes on the fullest rank; None where a launch brings the model.
        search_memory: bytes on the fullest rank; None where a launch brings the model.
        outlook: seconds and hours on given GPUs; None where none are given.
        task_vectors: what is on record of them; None where nothing is.
        warnings: one sentence each.
        notes: what is as asked for, but may not be as expected; one sentence each.
    """

    run_dir: Path
    domains: Sequence[DomainPlan]
    components: Components
    general_share: float | None
    amplification: Amplification | None
    stages: Sequence[StageBudget]
    runs: Sequence[RunPlan]
    parameters: Parameters
    base_parameters: int | None
    costs: Sequence[Cost]
    search_flops: float
    alternatives: Sequence[Cost]
    training_memory: TrainingMemory | None
    search_memory: SearchMemory | None
    outlook: Outlook | None
    task_vectors: TaskVectors | None
    warnings: Sequence[str]
    notes: Sequence[str]

    def times_search(self, cost: Cost) -> float | None:
        """Return how many such searches a cost is; None where nothing of a search is counted."""
        return cost.flops / self.search_flops if self.search_flops else None


def make_plan(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    settings_only: bool = False,
    hardware: Hardware | None = None,
) -> Plan:
    """Check the whole experiment and return what it will do.

    Args:
        path: the YAML file.
        overrides: ``"a.b.c=value"``; they win over the file.
        settings_only: open neither datasets nor checkpoints, which may not be there yet.
        hardware: what it would run on; also says how long everything takes.

    Raises:
        MergeMixError: something is wrong; the message lists it.
    """
    config = load_config(path, overrides)
    config = with_recorded_launch(config)
    if settings_only:
        _check_size_is_known(config)
        return plan_of(config, None, hardware)
    counts = check_files(config)
    check_tasks(config)
    return plan_of(config, counts, hardware)


def plan_of(config: Config, counts: Counts | None, hardware: Hardware | None = None) -> Plan:
    """Return the plan of an experiment.

    Args:
        config: the experiment.
        counts: what its files hold, which are checked; None where none may be opened.
        hardware: what it would run on, if hours are asked for.
    """
    tokens = None if counts is None else tokens_of(counts)
    bounds = bounds_of(config, tokens)
    strategy_of(config, tokens)  # refuses bounds and trials that cannot work
    base_parameters = None if counts is None else _base_parameters(config)
    parameters, training, search = _sizes(config, base_parameters)
    components = components_of(config, counts)
    noise = amplification_of(config, components, bounds)
    runs = list(plan_runs(config, counts, components))
    trained = {run.name: run.tokens for run in runs}
    costs = list(part_costs(config, runs, bounds, parameters.active))
    outlook = None if hardware is None else _outlook(config, hardware, costs)
    return Plan(
        run_dir=config.run_dir,
        domains=plan_domains(config, counts, bounds, components, trained),
        components=components,
        general_share=config.experts.general_share,
        amplification=noise,
        stages=stage_budgets(config),
        runs=runs,
        parameters=parameters,
        base_parameters=base_parameters,
        costs=costs,
        search_flops=sum(cost.flops for cost in costs if cost.what in OF_A_SEARCH),
        alternatives=list(alternatives(config, parameters.active)),
        training_memory=training,
        search_memory=search,
        outlook=outlook,
        task_vectors=None if counts is None else task_vectors_on_record(config),
        warnings=[
            *many_epochs(runs),
            *_assumed(config),
            *_unlike_the_study(config, components),
            *(noise_notes(f"the vertex of {noise.largest[0]}", noise.largest[1]) if noise else ()),
            *_other_base(parameters, base_parameters),
            *not_averaged(config, runs),
            *_not_launched(config),
            *_not_opened(counts),
            *does_not_fit(outlook),
            *_not_counted(config, bounds),
        ],
        notes=list(_not_ranked(config)),
    )


def _check_size_is_known(config: Config) -> None:
    if config.model is None:
        raise ConfigError(
            "--settings-only opens no checkpoint, but with launch.kind command the size of the "
            "model is that of base.checkpoint. Leave the flag away."
        )
    if config.model.vocab_size is None and config.tokenizer.kind != "byte":
        raise ConfigError(
            "--settings-only opens no tokenizer; expected its vocabulary in model.vocab_size."
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


def _assumed(config: Config) -> Iterator[str]:
    if assumed := assumed_components(config):
        yield assumed


def _unlike_the_study(config: Config, components: Components) -> Iterator[str]:
    if any(row is None for row in components.values()):
        return  # the data were not counted
    found = of_training(component_matrix(config), config.experts.general_share)
    if found.regime != "within":
        yield found.reason


def _not_launched(config: Config) -> Iterator[str]:
    if config.launch.kind == "command":
        yield (
            "the model comes from your launch: cost counts every parameter of the base, also the "
            "MoE experts that a token does not pass; memory is that of your launch, in the search "
            "the weights of base and experts come on top."
        )
        if not is_known(config):
            yield "steps and the search's own cost are known after the first launch."


def _not_opened(counts: Counts | None) -> Iterator[str]:
    if counts is None:
        yield (
            "only the settings are checked: no dataset, tokenizer or checkpoint was opened. Plan "
            "again without --settings-only when the data are there."
        )


def _outlook(config: Config, hardware: Hardware, costs: Sequence[Cost]) -> Outlook:
    models = sum(cost.runs for cost in costs if cost.what in SCORED)
    trained = sum(cost.tokens for cost in costs if cost.what == "experts")
    return make_outlook(
        config, hardware, models=models, windows=windows_of(config), trained_tokens=trained
    )


def _not_ranked(config: Config) -> Iterator[str]:
    if config.references and (few := too_few_to_rank(config)):
        yield f"mergemix validate: {few}"


def _not_counted(config: Config, bounds: Bounds) -> Iterator[str]:
    """Say which capabilities the cost of the search leaves out, and what it may save."""
    if (share := config.search.first_share) < 1:
        yield (
            "the search's cost is the most it can be: with search.first_share candidates that "
            f"cannot win are scored on {share:.0%} of the items alone."
        )
    if tasks := config.evaluate.lm_evals:
        yield f"the tasks of lm-eval come on top of the search's cost: {', '.join(tasks)}."
    if commands := config.evaluate.commands:
        models = models_of_search(config) + experts_alone(config, bounds)
        yield (
            f"commands come on top of the search's cost: {', '.join(commands)}, for {models} "
            "models, each written as a checkpoint first; by their timeouts at most "
            f"{command_hours(config, models):.3g} hours without retries."
        )


def _base_parameters(config: Config) -> int | None:
    if config.base.checkpoint is None:
        return None
    return read_index(resolve(config.base.checkpoint)).num_parameters()


def _other_base(parameters: Parameters, base: int | None) -> Iterator[str]:
    if base is not None and base != parameters.total:
        yield (
            f"the model section describes {parameters.total:,} parameters, base.checkpoint holds "
            f"{base:,}; the section must describe the model that was saved."
        )
