"""Run test bodies on real ranks: gloo, FileStore, CPU mode, a timeout that leaves nobody behind.

    def body(width):                     # a module-level function of the test module
        from megatron.core import parallel_state
        ...
        return loss                      # anything that pickles

    def test_the_loss_is_the_same_on_every_rank():
        first, second = run_distributed(body, 2, 96)

Megatron must be imported inside the body (or in a module that only the body imports): each rank
has CPU mode active first and only then imports the test module. Ranks are forked from a process
that has Megatron imported and has done nothing with it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
_RANKS = multiprocessing.get_context("forkserver")
_RANKS.set_forkserver_preload(["tests.support.rank"])
_GRACE_SECONDS = 3.0  # for the other ranks to fail too, so that every traceback is seen


class RankFailure(AssertionError):
    """A rank raised, died or ran out of time; the text holds its traceback and its output."""


def run_distributed(
    body: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0
) -> list[Any]:
    """Call ``body(*args)`` on ``world_size`` ranks and return what each rank returned, by rank.

    The default process group (gloo) exists when the body starts and is destroyed after it.
    Arguments and results travel by pickle. The first rank that fails fails the call.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        home = Path(folder)
        job = (list(sys.path), body.__module__, body.__qualname__, args)
        (home / "job").write_bytes(pickle.dumps(job))
        ranks = [_start_rank(home, rank, world_size) for rank in range(world_size)]
        try:
            _wait(ranks, home, timeout)
        finally:
            for process in ranks:
                _kill_rank(process)
        for rank in range(world_size):
            print(_read(home / f"output-{rank}"), end="")
        return [pickle.loads((home / f"result-{rank}").read_bytes()) for rank in range(world_size)]


def run_command(
    command: Sequence[str],
    env: Mapping[str, str] | None = None,
    timeout: float = 180.0,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command in CPU mode, in a process group of its own.

    Returns the exit code and everything written, stderr merged into stdout. A run that takes
    longer than ``timeout`` seconds is killed with all its ranks and raises :class:`RankFailure`.
    """
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            env=environment() | dict(env or {}),
            cwd=cwd,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            returncode = process.wait(timeout)
        except subprocess.TimeoutExpired:
            _kill_group(process)
            output.seek(0)
            raise RankFailure(f"No end after {timeout} s: {command}\n{output.read()}") from None
        finally:
            _kill_group(process)
        output.seek(0)
        return subprocess.CompletedProcess(list(command), returncode, output.read(), "")


def environment() -> dict[str, str]:
    """Return the environment of tests' processes: CPU mode, one thread, this repository."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    return os.environ | {
        "MERGEMIX_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": path,
    }


def _start_rank(home: Path, rank: int, world_size: int) -> ForkServerProcess:
    process = _RANKS.Process(target=_run_rank, args=(home, rank, world_size))
    process.start()
    return process


def _run_rank(home: Path, rank: int, world_size: int) -> None:
    from tests.support.rank import run_rank  # not for the process of pytest: turns CPU mode on

    run_rank(home, rank, world_size)


def _wait(ranks: Sequence[ForkServerProcess], home: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    failed_in_order: list[int] = []
    while any(process.exitcode is None for process in ranks) and time.monotonic() < deadline:
        for rank, process in enumerate(ranks):
            if process.exitcode and rank not in failed_in_order:
                if not failed_in_order:
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
                failed_in_order.append(rank)
        time.sleep(0.02)
    failed_in_order += [r for r, p in enumerate(ranks) if p.exitcode and r not in failed_in_order]
    if failed_in_order:
        raise RankFailure("\n".join(_failure(r, ranks[r], home) for r in failed_in_order))
    if stuck := [rank for rank, process in enumerate(ranks) if process.exitcode is None]:
        outputs = "\n".join(f"[rank {r}] {_read(home / f'output-{r}')}" for r in stuck)
        raise RankFailure(f"Ranks {stuck} of {len(ranks)} had no end after {timeout} s.\n{outputs}")


def _failure(rank: int, process: ForkServerProcess, home: Path) -> str:
    return (
        f"Rank {rank} ended with exit code {process.exitcode}.\n"
        f"{_read(home / f'output-{rank}')}\n{_read(home / f'traceback-{rank}')}"
    )


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _kill_rank(process: ForkServerProcess) -> None:
    assert process.pid is not None, "it was started"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # one that does not lead a group of its own yet
    process.join()


def _kill_group(process: subprocess.Popen[Any]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
