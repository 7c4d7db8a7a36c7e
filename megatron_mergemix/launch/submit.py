"""``mergemix submit``: write the jobs of what is not done, and queue them one after the other."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_mergemix.config import Config, load_config
from megatron_mergemix.config.validation import too_few_to_rank
from megatron_mergemix.errors import ConfigError, MergeMixError
from megatron_mergemix.evaluate.lm_eval_tasks import check_tasks
from megatron_mergemix.experiment.named_files import check_files
from megatron_mergemix.files.publishing import publish_json, publish_text
from megatron_mergemix.launch import slurm
from megatron_mergemix.launch.launch_line import launch_line
from megatron_mergemix.launch.pieces import is_done, pieces
from megatron_mergemix.launch.sbatch import (
    ARRAYS,
    Place,
    log_path,
    names_of,
    script,
    script_path,
    settings_path,
)
from megatron_mergemix.launch.slurm import Queue, Submitted
from megatron_mergemix.model_facts import with_recorded_launch
from megatron_mergemix.run_dir import RunDir

AFTER = {
    "base": (),
    "experts": ("base",),
    "search": ("base", "experts"),
    "blend": ("search",),
    "references": ("search",),
    "validation": ("references",),
}
"""Job -> the jobs that must have ended well before it."""

FOLLOWING = "then"
"""How the record calls the user's own job after the blend."""


def submit(
    config_path: Path,
    overrides: Sequence[str],
    *,
    dry_run: bool = False,
    validate: bool = False,
    then: Path | None = None,
) -> None:
    """Submit what is neither done nor queued: base, experts, search, blend, and what is asked for.

    Args:
        config_path: the YAML.
        overrides: of its settings.
        dry_run: print the jobs instead; nothing is written, and no cluster is needed.
        validate: really train the reference models after the search.
        then: the user's own sbatch file, to be run after the blend.

    Raises:
        MergeMixError: settings or files are wrong, or SLURM refuses.
    """
    config = load_config(config_path, overrides)
    _check(config, then)
    known = with_recorded_launch(config)
    check_files(known)
    check_tasks(known)
    todo = {
        job: [piece for piece in names if not is_done(known, piece)]
        for job, names in pieces(config, validate).items()
    }
    if validate and (few := too_few_to_rank(config)):
        print(f"# note: {few}" if dry_run else f"note: {few}")
    place = Place()
    if dry_run:
        _print_jobs(config, place, todo, then)
        return
    run_dir = place.run_dir(config)
    with run_dir.lock("submit"):
        record = slurm.read_record(run_dir)
        queue = slurm.read_queue(list(record.values()))
        _put_on_record(config, run_dir, record, queue)
        _Chain(config, place, todo, record, queue).submit(then)


def _check(config: Config, then: Path | None) -> None:
    if config.slurm is None:
        raise ConfigError(
            "slurm is missing: what the jobs ask the cluster for, such as "
            "slurm: {nodes: 1, gpus_per_node: 8, partition: NAME}."
        )
    if config.launch.kind == "command":
        launch_line(config)
    if then is not None and not then.is_file():
        raise ConfigError(f"--then names {then}, expected an sbatch file.")


def _put_on_record(
    config: Config, run_dir: RunDir, record: Mapping[str, Submitted], queue: Queue
) -> None:
    """Write down the settings that the jobs read, unless jobs with other ones are in the queue.

    Raises:
        MergeMixError: they are.
    """
    path, settings = settings_path(run_dir), config.model_dump(mode="json")
    # The run that follows has its own; and what jobs ask the cluster for is in their scripts.
    ours = (piece for name, piece in record.items() if name != FOLLOWING)
    live = sorted(piece.task for piece in ours if queue.is_live(piece))
    if live and _that_jobs_read(json.loads(path.read_text(encoding="utf-8"))) != _that_jobs_read(
        settings
    ):
        raise MergeMixError(
            f"jobs with other settings are in the queue: {', '.join(live)} ({path} has what they "
            f"read). Wait for them, or end them: scancel {' '.join(live)}"
        )
    publish_json(path, settings)


def _that_jobs_read(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "slurm"}


class _Chain:
    """Queues one job after the other and writes down each at once."""

    def __init__(
        self,
        config: Config,
        place: Place,
        todo: Mapping[str, Sequence[str]],
        record: dict[str, Submitted],
        queue: Queue,
    ) -> None:
        self._config = config
        self._place = place
        self._run_dir = place.run_dir(config)
        self._todo = todo
        self._record = record
        self._queue = queue
        self._new: set[str] = set()

    def submit(self, then: Path | None) -> None:
        """Queue what is to be done, then the user's own job."""
        (self._run_dir.log("any").parent).mkdir(parents=True, exist_ok=True)
        for job, names in self._todo.items():
            self._submit_job(job, names)
        if then is not None:
            self._submit_following(then)
        print(f"the jobs are in {self._run_dir.slurm}/; how they get on: mergemix status")

    def _submit_job(self, job: str, names: Sequence[str]) -> None:
        if not names:
            print(f"{job}: already done")
            return
        # What was queued behind a job that is replaced would wait for the old one.
        is_stale = any(before in self._new for before in AFTER[job])
        wanted = []
        for name in names:
            queued = self._record.get(name)
            if queued is None or not self._queue.is_live(queued):
                wanted.append(name)
            elif is_stale:
                slurm.cancel(queued.task)
                wanted.append(name)
            else:
                print(f"{name}: already in the queue as job {queued.task}")
        if not wanted:
            return
        path = script_path(self._run_dir, job)
        publish_text(path, _script(self._config, self._place, job, wanted))
        after = self._tasks(AFTER[job])
        number = slurm.sbatch(path, after)
        self._new.add(job)
        for name in wanted:
            task = _task(self._config, number, name)
            log = log_path(self._run_dir, job, task)
            self._record[name] = Submitted(task, str(log))
        slurm.write_record(self._run_dir, self._record)
        behind = f", after {', '.join(after)}" if after else ""
        print(f"{', '.join(wanted)}: job {number}{behind}")

    def _submit_following(self, then: Path) -> None:
        """Queue the user's own job, of which only the queue knows how it gets on."""
        queued = self._record.get(FOLLOWING)
        if queued is not None and "blend" not in self._new:
            print(
                f"{then}: was submitted as job {queued.task}. To submit it again, use sbatch, or "
                f"take {FOLLOWING!r} out of {slurm.record_path(self._run_dir)}."
            )
            return
        if queued is not None and self._queue.is_live(queued):
            slurm.cancel(queued.task)
        after = self._tasks(["blend"])
        number = slurm.sbatch(then, after, str(then))
        self._record[FOLLOWING] = Submitted(number, "")
        slurm.write_record(self._run_dir, self._record)
        print(f"{then}: job {number}{', after ' + after[0] if after else ''}")

    def _tasks(self, jobs: Sequence[str]) -> list[str]:
        """Return what has to end well before: whole arrays where all of an array has to."""
        tasks = [self._record[name] for job in jobs for name in self._todo.get(job, [])]
        array_of_new = {task.job for task in tasks if not self._queue.is_live(task)}
        return list(
            dict.fromkeys(task.job if task.job in array_of_new else task.task for task in tasks)
        )


def _script(config: Config, place: Place, job: str, pieces: Sequence[str]) -> str:
    left = [piece.removeprefix(f"{job}/") for piece in pieces] if job in ARRAYS else []
    return script(config, job, place, left)


def _task(config: Config, number: str, piece: str) -> str:
    job, _, name = piece.partition("/")
    return f"{number}_{names_of(config, job).index(name)}" if job in ARRAYS else number


def _print_jobs(
    config: Config, place: Place, todo: Mapping[str, Sequence[str]], then: Path | None
) -> None:
    """Print the jobs in the order in which they would be queued."""
    for job, names in todo.items():
        if not names:
            print(f"# {job}: already done\n")
            continue
        print(_command(script_path(place.run_dir(config), job), AFTER[job], todo))
        print(_script(config, place, job, names))
    if then is not None:
        print(_command(then, ("blend",), todo))


def _command(path: Path, after: Sequence[str], todo: Mapping[str, Sequence[str]]) -> str:
    waits = [f"${job}" for job in after if todo.get(job)]
    dependency = f" --dependency=afterok:{':'.join(waits)}" if waits else ""
    return f"# ==> sbatch{dependency} {shlex.quote(str(path))}"
