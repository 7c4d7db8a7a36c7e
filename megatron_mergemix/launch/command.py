"""Start the stages of an experiment as launches of Megatron-LM, by the user's own command."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence

from megatron_mergemix.config import Config
from megatron_mergemix.errors import ConfigError, MergeMixError, TrainingError
from megatron_mergemix.evaluate.lm_eval_tasks import check_tasks
from megatron_mergemix.launch.local_job import STDERR, describe_exit, wait_for
from megatron_mergemix.model_facts import is_known, with_recorded_launch
from megatron_mergemix.processes.error_file import ERROR_FILE
from megatron_mergemix.processes.process_life import die_with_parent
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.training_runs.experiment_runs import is_trained
from megatron_mergemix.validation.references import proxy_word


def run_stages(config: Config, job: str, names: Sequence[str] = (), *, quiet: bool = False) -> None:
    """Launch one stage after the other and wait for each; their output comes through.

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
    failed: list[str] = []
    for flags in stages_of(job, names):
        if config.launch.command is None:
            raise ConfigError(
                "launch.command is missing, so the stages are yours to start. The next one: add "
                f"--mergemix-config mix.yaml {' '.join(flags)} to your launch of pretrain_gpt.py."
            )
        # The settings on record, because the user may be editing the YAML already.
        experiment = ["--mergemix-config", str(RunDir(config.run_dir).config)]
        words = [*config.launch.command, *experiment, *flags]
        error_file.unlink(missing_ok=True)
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
        if code := wait_for(process):
            failed.append(
                f"the launch with {' '.join(flags)} ended with {describe_exit(code)}; it says why "
                "above. Mend the cause and start it again: what is finished is kept."
            )
            if job != "evaluate":  # whose launches do not build on each other
                break
        else:
            _check_finished(config, flags)
            if job == "train":  # hours; what scores reads the tasks itself
                config = _with_facts(config)
    if failed:
        raise MergeMixError("\n".join(failed))


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


def stages_of(job: str, names: Sequence[str]) -> Iterator[list[str]]:
    """Yield the flags of every launch that a job takes, in order."""
    if job in ("search", "diagnose"):
        yield ["--mergemix-stage", job]
    for name in names:
        if job == "evaluate":
            yield ["--mergemix-stage", "evaluate", "--mergemix-model", name]
            continue
        kind, _, which = name.partition("/")
        if kind == "experts":
            yield ["--mergemix-stage", "expert", "--mergemix-expert", which]
        else:
            mixture = ["--mergemix-mixture", which or name]
            yield ["--mergemix-stage", "reference", *mixture]
            if job == "validate":
                yield ["--mergemix-stage", "evaluate", *mixture]
                yield ["--mergemix-stage", "evaluate", "--mergemix-model", proxy_word(name)]
