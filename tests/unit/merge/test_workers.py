"""What becomes of the worker processes of a merge."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_mergemix.merge import checkpoints
from tests.support.processes import Command

STARTS = "from tests.unit.merge.test_workers import start; start()"


def wait_long(job: object, part: Sequence[str]) -> None:
    Path(part[0]).touch()
    time.sleep(600)


def start() -> None:
    """Give work to two workers, and do some here, that takes longer than any test."""
    parts = [["first"], ["second"], ["third"]]
    list(checkpoints._in_processes(wait_long, None, parts))  # type: ignore


def test_workers_of_a_killed_merge_end_too(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Command(["-c", STARTS], tmp_path) as command:
        names = ("first", "second", "third")
        command.wait_until(lambda: all((tmp_path / name).exists() for name in names))
        assert len(command.alive()) >= 3
        os.kill(command.process.pid, signal.SIGKILL)
        command.end()
        assert command.survivors(patience=30) == []
