"""Processes end with the one that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]

CHILD = """
import time
from megatron_mergemix.processes.process_life import die_with_parent
die_with_parent()
print("armed", flush=True)
time.sleep(60)
"""
PARENT = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}])
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_process_dies_with_its_parent_even_by_kill_9() -> None:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert parent.stdout is not None
    said = sorted(parent.stdout.readline().strip() for _ in range(2))
    child = int(said[0])
    assert said[1] == "armed"
    try:
        parent.kill()
        parent.wait()
        _wait_for(lambda: not _runs(child), seconds=20)
        assert not _runs(child)
    finally:
        parent.stdout.close()
        if _runs(child):
            os.kill(child, signal.SIGKILL)


SPAWNS = """
import multiprocessing, os, sys, time
from megatron_mergemix.processes.process_life import die_with_spawner, tell_children_their_parent
if __name__ == "__mp_main__":
    open(sys.argv[1] + ".here", "w").write(str(os.getpid()))
    time.sleep(2)  # as long as imports take
    die_with_spawner()
    open(sys.argv[1] + ".armed", "w").close()
if __name__ == "__main__":
    tell_children_their_parent()
    manager = multiprocessing.get_context("spawn").Manager()
"""


@pytest.mark.parametrize("killed", [True, False])
def test_a_child_that_was_not_armed_yet_dies_with_its_parent_too(
    tmp_path: Path, killed: bool
) -> None:
    (tmp_path / "script.py").write_text(SPAWNS)
    words = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "child")]
    parent = subprocess.Popen(words, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    here, armed = tmp_path / "child.here", tmp_path / "child.armed"
    _wait_for(lambda: here.exists() and here.read_text() != "")
    child = int(here.read_text())
    try:
        if killed:
            parent.kill()
        parent.wait()
        _wait_for(lambda: not _runs(child))
        assert armed.exists() is not killed
    finally:
        if _runs(child):
            os.kill(child, signal.SIGKILL)


def _wait_for(happened: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
