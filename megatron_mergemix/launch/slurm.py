"""SLURM's commands, and the record of what was submitted for an experiment."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_mergemix.errors import MergeMixError
from megatron_mergemix.files.publishing import publish_json
from megatron_mergemix.run_dir import RunDir

_ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
}


@dataclass(frozen=True)
class Submitted:
    """One piece of an experiment in the queue.

    Attributes:
        task: job, or array task such as ``"13_2"``.
        log: where its output goes.
    """

    task: str
    log: str

    @property
    def job(self) -> str:
        """Return the job that an array task belongs to."""
        return self.task.partition("_")[0]


@dataclass(frozen=True)
class Queue:
    """What the cluster says about jobs that wait, run or ended lately."""

    states: Mapping[str, str] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)

    def is_live(self, piece: Submitted) -> bool:
        """Return whether it will run, or runs."""
        state = self.states.get(piece.task)
        never = self.reasons.get(piece.task) == "DependencyNeverSatisfied"
        return state is not None and state not in _ENDED and not never


def has_slurm() -> bool:
    """Return whether this machine can talk to a cluster."""
    return shutil.which("squeue") is not None


def read_queue(pieces: Sequence[Submitted]) -> Queue:
    """Return what the cluster says about some pieces; those it has forgotten are not in it.

    ``squeue`` forgets a job minutes after its end; ``sacct`` knows it for longer, where a cluster
    keeps accounts.

    Raises:
        MergeMixError: the cluster does not answer.
    """
    if not pieces:
        return Queue()
    listed = _call("squeue", "--me", "--array", "--noheader", "--states=all", "--format=%i|%T|%r")
    rows = [line.strip().split("|", 2) for line in listed.splitlines()]
    states = {row[0]: row[1] for row in rows if len(row) == 3}
    reasons = {row[0]: row[2] for row in rows if len(row) == 3}
    forgotten = sorted({piece.job for piece in pieces if piece.task not in states})
    if forgotten and shutil.which("sacct"):
        for task, state in _accounts(forgotten).items():
            states.setdefault(task, state)
    return Queue(states, reasons)


def _accounts(jobs: Sequence[str]) -> dict[str, str]:
    """Return the states of ended jobs; none on a cluster that keeps no accounts."""
    done = subprocess.run(
        ["sacct", "-X", "--noheader", "-P", "--format=JobID,State", f"--jobs={','.join(jobs)}"],
        capture_output=True,
        text=True,
    )
    rows = [line.split("|") for line in done.stdout.splitlines()]
    # "CANCELLED by 1000" is CANCELLED.
    return {row[0]: row[1].split()[0] for row in rows if len(row) == 2 and row[1]}


def sbatch(script: Path, after: Sequence[str], name: str = "") -> str:
    """Submit a script and return the job's number.

    Args:
        script: the file.
        after: jobs or array tasks that must have ended well before; if one fails, it is dropped.
        name: what the message calls it.

    Raises:
        MergeMixError: SLURM refuses it; carries its words.
    """
    words = ["--parsable"]
    if after:
        words += [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]
    answer = _call("sbatch", *words, str(script), what=f"submit {name or script.name}")
    return answer.strip().split(";")[0]


def cancel(task: str) -> None:
    """Take a job or array task out of the queue."""
    _call("scancel", task)


def _call(command: str, *words: str, what: str = "") -> str:
    try:
        done = subprocess.run([command, *words], capture_output=True, text=True)
    except FileNotFoundError:
        raise MergeMixError(
            f"there is no {command} on this machine, expected SLURM's client commands. Submit "
            "from a login node of the cluster, or look at the jobs with --dry-run."
        ) from None
    if done.returncode != 0:
        raise MergeMixError(
            f"cannot {what or f'ask {command}'}: {(done.stderr or done.stdout).strip()}"
        )
    return done.stdout


def record_path(run_dir: RunDir) -> Path:
    """Return the file that says what was submitted."""
    return run_dir.slurm / "jobs.json"


def read_record(run_dir: RunDir) -> dict[str, Submitted]:
    """Return what was submitted last for each piece, by the piece's name."""
    path = record_path(run_dir)
    if not path.exists():
        return {}
    return {name: Submitted(**entry) for name, entry in json.loads(path.read_text()).items()}


def write_record(run_dir: RunDir, record: Mapping[str, Submitted]) -> None:
    """Write the record in one piece."""
    entries = {name: asdict(piece) for name, piece in record.items()}
    publish_json(record_path(run_dir), entries)
