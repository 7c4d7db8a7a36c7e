"""Start ``mergemix`` as a user does, find everything it started, and kill parts of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import psutil

from tests.support.run_distributed import REPOSITORY, RankFailure

_MARK = "MERGEMIX_TEST_MARK"
_RANK_MODULES = {"megatron_mergemix.jobs.worker", "megatron_mergemix.launch"}


class Command:
    """A command in a session of its own; whatever it starts inherits a mark by which it is found.

    As a context manager it leaves nobody behind.
    """

    def __init__(
        self, words: Sequence[str], home: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start ``python words...`` in CPU mode, writing its output to two new files in ``home``.

        Args:
            words: what follows the interpreter.
            home: an existing folder.
            environment: added to the present one; its PYTHONPATH goes before the repository.
        """
        self._mark = uuid.uuid4().hex
        self._out, self._err = home / f"{self._mark}.out", home / f"{self._mark}.err"
        added = dict(environment or {})
        path = [added.pop("PYTHONPATH", ""), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, *words],
                stdout=out,
                stderr=err,
                start_new_session=True,
                env=os.environ
                | {
                    "MERGEMIX_DEVICE": "cpu",
                    "OMP_NUM_THREADS": "1",
                    "CUDA_VISIBLE_DEVICES": "",
                    "PYTHONPATH": os.pathsep.join(filter(None, path)),
                    _MARK: self._mark,
                    **added,
                },
            )

    @property
    def stdout(self) -> str:
        """Return what it has written to standard output so far."""
        return self._out.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        """Return what it has written to standard error so far."""
        return self._err.read_text(errors="replace")

    def alive(self) -> list[psutil.Process]:
        """Return every process of this command that still runs."""
        found = []
        for process in psutil.process_iter():
            try:
                is_ours = process.environ().get(_MARK) == self._mark
                if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def rank(self, number: int) -> psutil.Process:
        """Return the process of one rank, not one of its helpers."""
        for process in self.alive():
            is_rank = not _RANK_MODULES.isdisjoint(process.cmdline())
            if is_rank and process.environ().get("RANK") == str(number) and not is_helper(process):
                return process
        raise RankFailure(f"rank {number} does not run\n{self.stdout}{self.stderr}")

    def wait_until(self, happened: Callable[[], bool], timeout: float = 240.0) -> None:
        """Return as soon as ``happened()``; fail when the command ends before."""
        deadline = time.monotonic() + timeout
        while not happened():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RankFailure(f"it did not come to that\n{self.stdout}\n{self.stderr}")
            time.sleep(0.005)

    def end(self, timeout: float = 240.0) -> int:
        """Wait for the command itself and return its exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise RankFailure(f"no end after {timeout} s\n{self.stdout}\n{self.stderr}") from None

    def survivors(self, patience: float = 30.0) -> list[str]:
        """Return the command lines of what still runs after ``patience`` seconds; else nothing."""
        deadline = time.monotonic() + patience
        while (left := self.alive()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return [" ".join(process.cmdline()) for process in left]

    def __enter__(self) -> Command:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self.alive():
            process.send_signal(signal.SIGKILL)
        self.process.wait()


def is_helper(process: psutil.Process) -> bool:
    """Return whether a process looks like a rank because one forked it."""
    parent = process.parent()
    return parent is not None and "RANK" in parent.environ()


def is_dead(pid: int, patience: float = 60.0) -> bool:
    """Return whether a process that somebody has killed is dead within ``patience`` seconds."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:  # its parent is to reap it
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def mergemix(
    config: Path,
    *words: str,
    environment: Mapping[str, str] | None = None,
    home: Path | None = None,
) -> Command:
    """Start ``mergemix words[0] config words[1:]``."""
    verb, *rest = words
    command = ["-m", "megatron_mergemix", verb, str(config), *rest]
    return Command(command, home or config.parent, environment)
