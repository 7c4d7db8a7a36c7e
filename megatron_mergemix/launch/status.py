"""``mergemix status``: what is done, runs, waits or failed, from the files of the experiment.

Where jobs were submitted to a cluster, its queue is asked as well.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from megatron_mergemix.checkpoint.saves import complete_saves
from megatron_mergemix.config import Config, load_config
from megatron_mergemix.console import console
from megatron_mergemix.errors import MergeMixError
from megatron_mergemix.launch import slurm
from megatron_mergemix.launch.pieces import is_done, pieces
from megatron_mergemix.launch.slurm import Queue, Submitted
from megatron_mergemix.model_facts import with_recorded_launch
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.search.budgets import stage_budgets

_OF_A_REFERENCE = ("references", "evaluate")
"""Kinds of locks, as the training and the scoring of a reference model take them."""

State = Literal["done", "running", "waiting", "failed", "stopped", "refused"]


@dataclass(frozen=True)
class Status:
    """How one piece of the experiment gets on.

    Attributes:
        piece: ``base``, ``experts/math``, ``search``, ``blend``, ``references/uniform``,
            ``validation``.
        state: ``stopped`` was begun and does not run; ``refused`` holds something else.
        detail: how far it is, what it waits for, or what went wrong.
        job: the SLURM job or array task, if one was submitted.
        log: where its output went, if that is known.
    """

    piece: str
    state: State
    detail: str = ""
    job: str | None = None
    log: str | None = None


def status(config_path: Path, overrides: Sequence[str], *, as_json: bool = False) -> None:
    """Print how every piece gets on; changes nothing."""
    rows = statuses(with_recorded_launch(load_config(config_path, overrides)))
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    table = Table("piece", "state", "job", "how")
    for row in rows:
        table.add_row(row.piece, row.state, row.job or "", row.detail)
    console().print(table)


def statuses(config: Config) -> list[Status]:
    """Return how every piece gets on, in the order of the work.

    Args:
        config: the experiment, with what launches of Megatron-LM put on record.

    Raises:
        MergeMixError: jobs were submitted from this machine's cluster, and it does not answer.
    """
    record = slurm.read_record(RunDir(config.run_dir))
    queue = slurm.read_queue(list(record.values())) if slurm.has_slurm() else Queue()
    validate = bool(config.references) and (
        "validation" in record or RunDir(config.run_dir).reference(".").exists()
    )
    names = [name for group in pieces(config, validate).values() for name in group]
    return [_status(config, name, record.get(name), queue) for name in names]


def _status(config: Config, piece: str, submitted: Submitted | None, queue: Queue) -> Status:
    job = submitted.task if submitted else None
    try:
        done = is_done(config, piece)
    except MergeMixError as error:
        return Status(piece, "refused", str(error), job)
    if done:
        return Status(piece, "done", "", job)
    run_dir = RunDir(config.run_dir)
    how_far = _how_far(config, piece)
    # Of a cluster's jobs, the one that compares works on no reference itself.
    compares = piece == "validation" and submitted is not None
    holder = None if compares else _holder(config, piece)
    if holder is not None:
        return Status(piece, "running", f"{how_far} ({holder})".strip(), job)
    if submitted is not None:
        return _in_the_queue(piece, submitted, queue, how_far)
    log = _local_log(run_dir, piece)
    left = log.with_suffix(".error")
    if how_far and left.exists():
        told = f"{how_far}: {_first_line(left)}"
        if not log.exists():  # a launch of the user's own writes to the terminal
            return Status(piece, "failed", told)
        return Status(piece, "failed", f"{told} ({log})", None, str(log))
    if how_far:
        return Status(piece, "stopped", f"{how_far}; start it again to continue")
    return Status(piece, "waiting", "not started")


def _in_the_queue(piece: str, submitted: Submitted, queue: Queue, how_far: str) -> Status:
    """Return the status of a piece that is not done, and that no process works on."""
    task, log = submitted.task, Path(submitted.log)
    state = queue.states.get(task, "gone from the queue")
    if queue.is_live(submitted):
        if state == "PENDING":
            why = queue.reasons.get(task, "")
            return Status(piece, "waiting", f"{how_far} PENDING ({why})".strip(), task)
        return Status(piece, "running", f"{how_far} {state}".strip(), task, str(log))
    if not slurm.has_slurm():
        return Status(piece, "waiting", f"{how_far} (no squeue here to ask)".strip(), task)
    error = log.with_suffix(".error")
    if not error.exists() and not log.exists():
        # Dropped, because what it waited for failed.
        return Status(piece, "waiting", f"{state}, never started: submit it again", task)
    why = _first_line(error) if error.exists() else _last_line(log)
    where = f"{how_far} {state}".strip()
    return Status(piece, "failed", f"{where}: {why} ({log})", task, str(log))


def _holder(config: Config, piece: str) -> str | None:
    """Return which process works on a piece, or None."""
    kind, _, name = piece.partition("/")
    names = [piece]
    if piece == "validation":
        names = [f"{each}/{name}" for name in config.references for each in _OF_A_REFERENCE]
    elif kind == "references":
        names = [f"{each}/{name}" for each in _OF_A_REFERENCE]
    holders = (RunDir(config.run_dir).lock(name).holder() for name in names)
    return next((holder for holder in holders if holder is not None), None)


def _how_far(config: Config, piece: str) -> str:
    """Return ``step 20 of 60`` or ``17 trials of 40``; nothing for what has not been begun."""
    run_dir = RunDir(config.run_dir)
    if piece == "validation":
        begun = [(run_dir.reference(name) / "run.json").exists() for name in config.references]
        scored = [(run_dir.reference(name) / "scores.json").exists() for name in config.references]
        if not any(begun):
            return ""
        return f"{sum(scored)} of {len(scored)} reference models trained and scored"
    if piece == "search":
        if not run_dir.trials.exists():
            return ""
        trials = max(run_dir.trials.read_bytes().count(b"\n") - 1, 0)  # the first line is no trial
        if config.search.hierarchy is not None:
            most = sum(stage.models for stage in stage_budgets(config))
            return f"{trials} trials of at most {most}, and what failed once more"
        most = config.search.num_trials(len(config.domains))
        more = ", those of them that race on" if config.search.first_share < 1 else ""
        return f"{trials} trials of {most}{more} and the candidates"
    directory = run_dir.root / piece
    if not (directory / "run.json").exists():
        return ""
    step, steps = _steps(directory)
    if piece.startswith("references/") and (directory / "finished.json").exists():
        is_scored = (directory / "scores.json").exists()
        return f"trained{', scored, its merge is not' if is_scored else ', not scored'}"
    return f"step {step} of {steps}"


def _steps(directory: Path) -> tuple[int, int]:
    """Return the last step that was shown, else the last that was saved, and how many there are."""
    described: dict[str, Any] = json.loads((directory / "run.json").read_text())
    progress = directory / "progress.json"
    if progress.exists():
        step = json.loads(progress.read_text())["step"]
    else:
        saves = complete_saves(directory / "checkpoints")
        step = saves[-1][0] if saves else 0
    return step, described["description"]["steps"]


def _local_log(run_dir: RunDir, piece: str) -> Path:
    """Return the log of the job that does a piece on this machine."""
    kind = piece.partition("/")[0]
    jobs = {"search": "search", "references": "validate", "validation": "validate"}
    return run_dir.log(jobs.get(kind, "train"))


def _first_line(error: Path) -> str:
    return (_lines(error) or ["no message"])[0]


def _last_line(log: Path) -> str:
    return (_lines(log) or ["no output"])[-1]


def _lines(path: Path) -> list[str]:
    lines = path.read_text(errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip()]
