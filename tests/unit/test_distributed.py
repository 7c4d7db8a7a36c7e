"""One rank alone, and processes that must not outlive their parent; many ranks: distributed/."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_mergemix import distributed
from megatron_mergemix.errors import ConfigError
from tests.support.run_distributed import REPOSITORY


def test_without_a_process_group_there_is_one_rank() -> None:
    assert distributed.rank() == 0
    assert distributed.world_size() == 1


def test_one_rank_keeps_its_own_object() -> None:
    value = {"a": [1]}
    assert distributed.broadcast_object(value) is value


def test_one_rank_raises_its_own_error() -> None:
    error = ConfigError("wrong")
    distributed.fail_together(None)
    with pytest.raises(ConfigError) as caught:
        distributed.fail_together(error)
    assert caught.value is error


def test_together_lets_the_error_of_its_block_through() -> None:
    with distributed.together():
        pass
    with pytest.raises(ConfigError, match="wrong"), distributed.together():
        raise ConfigError("wrong")


def test_an_interruption_is_not_gathered_from_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others may be anywhere; a collective would hang."""
    monkeypatch.setattr(distributed, "fail_together", lambda error: pytest.fail("a collective"))
    with pytest.raises(KeyboardInterrupt), distributed.together():
        raise KeyboardInterrupt


def test_foreign_errors_are_described_with_their_kind() -> None:
    assert distributed._describe(ConfigError("no such key")) == "no such key"
    assert distributed._describe(ValueError("odd")) == "ValueError: odd"


def test_a_resource_is_let_go_when_its_block_fails() -> None:
    events: list[str] = []

    @contextmanager
    def resource() -> Iterator[None]:
        events.append("held")
        try:
            yield
        finally:
            events.append("let go")

    with pytest.raises(ConfigError), distributed.held_by_rank_0(resource()):
        raise ConfigError("wrong")
    assert events == ["held", "let go"]


CHILD = """
import time
from megatron_mergemix.distributed import die_with_parent
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
from megatron_mergemix.distributed import die_with_parent, tell_children_their_parent
if __name__ == "__mp_main__":
    open(sys.argv[1] + ".here", "w").write(str(os.getpid()))
    time.sleep(2)  # as long as imports take
    die_with_parent(spawned=True)
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


def test_without_a_process_group_rank_0_is_this_process() -> None:
    assert distributed.from_rank_0(lambda: "made here") == "made here"


def test_what_rank_0_cannot_make_is_an_error() -> None:
    def cannot() -> None:
        raise OSError("no such folder")

    with pytest.raises(OSError, match="no such folder"):
        distributed.from_rank_0(cannot)
