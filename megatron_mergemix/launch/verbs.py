"""The verbs of ``mergemix``: look what is done, start the job for the rest, show the result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_mergemix.config import Config, load_config
from megatron_mergemix.config.validation import too_few_to_rank
from megatron_mergemix.errors import ConfigError, SearchError
from megatron_mergemix.evaluate.lm_eval_tasks import check_tasks
from megatron_mergemix.experiment import checks, search_record
from megatron_mergemix.experiment.named_files import check_files
from megatron_mergemix.files.publishing import publish_json
from megatron_mergemix.launch.command import run_stages
from megatron_mergemix.launch.fidelity_scalars import write_scalars
from megatron_mergemix.launch.fidelity_summary import print_fidelity
from megatron_mergemix.launch.local_job import run_job
from megatron_mergemix.launch.summary import (
    print_blend,
    print_comparison,
    print_files,
    print_search,
)
from megatron_mergemix.model_facts import with_recorded_launch
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.training_runs import experiment_runs
from megatron_mergemix.training_runs.mixtures import assumed_components, is_learned
from megatron_mergemix.validation.references import is_measured


def train(config_path: Path, overrides: Sequence[str], what: Sequence[str]) -> None:
    """Train what is asked for and not done: base, experts, expert:NAME, references, ..."""
    with experiment_on_record(config_path, overrides) as config:
        _train(config, _runs_named(config, what))


def search(config_path: Path, overrides: Sequence[str]) -> None:
    """Search the mixture; base and experts must be there."""
    with experiment_on_record(config_path, overrides) as config:
        _search(config)


def blend(config_path: Path, overrides: Sequence[str]) -> None:
    """Write the learned mixture as Megatron blend files, whatever else is under way."""
    config = with_recorded_launch(load_config(config_path, overrides))
    check_files(config)
    RunDir(config.run_dir).put_on_record(config.model_dump(mode="json"))
    _blend(config)


def validate(config_path: Path, overrides: Sequence[str]) -> None:
    """Train the reference models and compare them."""
    with experiment_on_record(config_path, overrides) as config:
        _validate(config)


def run(config_path: Path, overrides: Sequence[str]) -> None:
    """Do what is not done yet on the way to a blend: base, experts, search, blend files."""
    with experiment_on_record(config_path, overrides) as config:
        config = _train(config, _runs_named(config, ["base", "experts"]))
        config = _search(config)
        _blend(config)
        print_files(config)


@contextmanager
def experiment_on_record(config_path: Path, overrides: Sequence[str]) -> Iterator[Config]:
    """Give the checked experiment, locked against a second start, its settings on record."""
    config = with_recorded_launch(load_config(config_path, overrides))
    check_files(config)
    run_dir = RunDir(config.run_dir)
    with run_dir.lock("run"):
        publish_json(run_dir.config, config.model_dump(mode="json"))
        yield config


def _runs_named(config: Config, what: Sequence[str]) -> list[str]:
    """Return run names for the words of the command line, in an order that can be trained."""
    names: list[str] = []
    for word in what:
        kind, _, which = word.partition(":")
        if kind == "base":
            names += ["base"] if config.base.train else []
        elif kind == "experts" or kind == "references":
            every = config.expert_names if kind == "experts" else config.references
            skip = kind == "experts" and config.experts.checkpoints
            names += [] if skip else [f"{kind}/{name}" for name in every]
        else:
            names.append(f"{kind}s/{which}")
    order = ["base", "experts", "references"]
    return sorted(dict.fromkeys(names), key=lambda name: order.index(name.split("/")[0]))


def _train(config: Config, names: Sequence[str]) -> Config:
    """Start one job for all runs that are left; a run is described once its start is there."""
    if not names:
        print("nothing to train")
    if any(is_learned(config, name) for name in names):
        search_record.finished_search(config)
    for done, name in enumerate(names):
        if not experiment_runs.is_trained(config, name):
            check_tasks(config)
            return start(config, "train", names[done:])
        print(f"{name}: already trained")
    return config


def start(config: Config, job: str, names: Sequence[str] = (), *, quiet: bool = False) -> Config:
    """Do a job on all its ranks; return the settings with what it put on record."""
    run = run_job if config.launch.kind == "builtin" else run_stages
    run(config, job, names, quiet=quiet)
    return with_recorded_launch(config)


def _search(config: Config) -> Config:
    result = search_record.search_result(config)
    if result is None:
        checks.check_checkpoints(config)
        checks.check_journal(config)
        if assumed := assumed_components(config):
            print(f"note: {assumed}", flush=True)
        config = start(config, "search")
        result = search_record.search_result(config)
        if result is None:
            raise SearchError(
                f"{RunDir(config.run_dir).result} does not fit the checkpoints and datasets that "
                "are there now: they were changed while the search ran. Leave them alone and "
                "start it again."
            )
    else:
        print(f"search: already done, {result['trials']} trials")
    print_search(config, result)
    return config


def _blend(config: Config) -> None:
    result = search_record.finished_search(config)
    print_blend(config, result["mixture"], search_record.write_learned_blend(config, result))


def _validate(config: Config) -> None:
    names = list(config.references)
    if not names:
        raise ConfigError(
            "references is empty: name the mixtures to train, e.g. uniform: uniform, or have them "
            "chosen: --set validation.space_filling=24."
        )
    # Also without a learned reference: the search fixes what 0 and 1 of the utility mean.
    result = search_record.finished_search(config)
    written = search_record.write_learned_blend(config, result)
    missing = [name for name in names if not is_measured(config, name)]
    if missing:
        if few := too_few_to_rank(config):
            print(f"note: {few}", flush=True)
        config = start(config, "validate", missing)
    from megatron_mergemix.validation.fidelity import validation_result

    found = validation_result(config)
    publish_json(RunDir(config.run_dir).validation, found)
    write_scalars(RunDir(config.run_dir).tensorboard("validate"), found)
    print_blend(config, result["mixture"], written)
    print_comparison(config, found["references"])
    print_fidelity(found)
    print_files(config)
