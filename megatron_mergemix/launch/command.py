"""Start the stages of an experiment as launches of Megatron-LM, by the user's own command."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from megatron_mergemix.config import Config
from megatron_mergemix.config.validation import how_to_leave_out
from megatron_mergemix.errors import ConfigError, MergeMixError, TrainingError
from megatron_mergemix.evaluate.lm_eval_tasks import check_tasks
from megatron_mergemix.launch.local_job import STDERR, describe_exit, wait_for
from megatron_mergemix.model_facts import is_known, with_recorded_launch
from megatron_mergemix.processes.error_file import ERROR_FILE
from megatron_mergemix.processes.process_life import die_with_parent
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.training_runs.experiment_runs import is_trained
from megatron_mergemix.validation.references import proxy_record, proxy_word, reference_record

FAILURES_IN_A_ROW = 3
"""After so many, what fails is not one reference or model but every launch."""


class Stage(NamedTuple):
    """One launch of a job.

    Attributes:
        flags: what it adds to the user's command.
        is_done: whether there is nothing to start; asked when those before it have ended.
        needs: the flags of another that must have ended well.
        may_fail: whether the launches after it are worth their while all the same.
        reference: that it is for, in a validation.
    """

    flags: list[str]
    is_done: Callable[[Config], bool] = lambda config: False
    needs: list[str] | None = None
    may_fail: bool = False
    reference: str | None = None


def run_stages(config: Config, job: str, names: Sequence[str] = (), *, quiet: bool = False) -> None:
    """Launch the stages that are not done, one after the other; their output comes through.

    One reference, or one model that is scored, that fails keeps no other from its launch.

    Args:
        config: the experiment; its settings are on record in ``run_dir/config.json``.
        job: ``train``, ``search``, ``validate``, ``evaluate`` or ``diagnose``, as of the built-in
            trainer.
        names: of training runs, of references for ``validate``, of models for ``evaluate``.
        quiet: their output goes to standard error.

    Raises:
        ConfigError: ``launch.command`` is missing.
        MergeMixError: a launch failed; what is finished is kept.
    """
    error_file = RunDir(config.run_dir).log(job).with_suffix(".error")
    error_file.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {ERROR_FILE: str(error_file.absolute())}
    failed: list[Stage] = []
    messages: list[str] = []
    in_a_row = 0
    for stage in stages_of(job, names):
        flags = stage.flags
        is_spared = stage.needs in [each.flags for each in failed]
        if is_spared or stage.is_done(with_recorded_launch(config)):
            continue
        if config.launch.command is None:
            raise ConfigError(
                "launch.command is missing, so the stages are yours to start. The next one: add "
                f"--mergemix-config mix.yaml {' '.join(flags)} to your launch of pretrain_gpt.py."
            )
        if code := _launch(config, flags, environment, quiet):
            failed.append(stage)
            messages.append(
                f"the launch with {' '.join(flags)} ended with {describe_exit(code)}; it says why "
                "above. Mend the cause and start it again: what is finished is kept."
            )
            in_a_row += 1
            if not stage.may_fail:
                break
            if in_a_row == FAILURES_IN_A_ROW:
                messages.append(f"{in_a_row} in a row failed, so no other was started.")
                break
        else:
            in_a_row = 0
            _check_finished(config, flags)
            if job == "train":  # hours; what scores reads the tasks itself
                config = _with_facts(config)
    if failed:
        references = list(dict.fromkeys(s.reference for s in failed if s.reference is not None))
        if references:
            messages.append(f"If it fails again, {how_to_leave_out(config, references)}.")
        raise MergeMixError("\n".join(messages))


def _launch(config: Config, flags: Sequence[str], environment: dict[str, str], quiet: bool) -> int:
    """Start the user's command with these flags and wait for it; return how it ended.

    Raises:
        ConfigError: it cannot be started.
    """
    assert config.launch.command is not None, "checked before"
    # The settings on record, because the user may be editing the YAML already.
    experiment = ["--mergemix-config", str(RunDir(config.run_dir).config)]
    words = [*config.launch.command, *experiment, *flags]
    Path(environment[ERROR_FILE]).unlink(missing_ok=True)
    try:
        process = subprocess.Popen(
            words,
            stdout=STDERR if quiet else None,
            env=environment,
            preexec_fn=die_with_parent,
        )
    except OSError as error:
        raise ConfigError(
            f"launch.command cannot be started: {words[0]}: {error.strerror}."
        ) from error
    return wait_for(process)


def _with_facts(config: Config) -> Config:
    """Return the settings with what the first launch tells; the tasks must fit into its model.

    Raises:
        ConfigError: as :func:`.check_tasks`.
    """
    known = with_recorded_launch(config)
    if not is_known(config) and is_known(known):
        check_tasks(known)
    return known


def _check_finished(config: Config, flags: Sequence[str]) -> None:
    """Refuse to go on from a run that its launch has left, as --exit-duration-in-mins makes it.

    Raises:
        TrainingError: a run was to be trained, and is not done.
    """
    _, stage, *named = flags
    folder = {"expert": "experts", "reference": "references"}.get(stage)
    if folder and not is_trained(with_recorded_launch(config), f"{folder}/{named[-1]}"):
        raise TrainingError(
            f"the launch with {' '.join(flags)} ended well before its run was done, as with "
            "--exit-duration-in-mins, --exit-interval or a signal. Start it again and it continues "
            "from its last save."
        )


def stages_of(job: str, names: Sequence[str]) -> Iterator[Stage]:
    """Yield every launch that a job takes, in order."""
    if job in ("search", "diagnose"):
        yield Stage(["--mergemix-stage", job])
    for name in names:
        if job == "evaluate":
            flags = ["--mergemix-stage", "evaluate", "--mergemix-model", name]
            yield Stage(flags, may_fail=True)
        elif job == "validate":
            yield from _stages_of_reference(name)
        else:
            kind, _, which = name.partition("/")
            is_done = partial(is_trained, name=name)
            if kind == "experts":
                yield Stage(["--mergemix-stage", "expert", "--mergemix-expert", which], is_done)
            else:
                flags = ["--mergemix-stage", "reference", "--mergemix-mixture", which]
                yield Stage(flags, is_done, may_fail=True, reference=which)


def _stages_of_reference(name: str) -> Iterator[Stage]:
    """Yield the training of a reference, its scoring, and that of the merge for its mixture."""
    mixture = ["--mergemix-mixture", name]
    train = ["--mergemix-stage", "reference", *mixture]
    any_may_fail = partial(Stage, may_fail=True, reference=name)
    yield any_may_fail(train, partial(is_trained, name=f"references/{name}"))
    yield any_may_fail(
        ["--mergemix-stage", "evaluate", *mixture],
        lambda config: reference_record(config, name) is not None,
        needs=train,
    )
    yield any_may_fail(
        ["--mergemix-stage", "evaluate", "--mergemix-model", proxy_word(name)],
        lambda config: proxy_record(config, name) is not None,
    )
