"""The lock that keeps a second start out."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_mergemix.errors import MergeMixError
from megatron_mergemix.files.lock import Lock
from megatron_mergemix.run_dir import RunDir

HOLDER = """
import sys, time
from pathlib import Path
from megatron_mergemix.run_dir import RunDir
with RunDir(Path(sys.argv[1])).lock("run"):
    print("locked", flush=True)
    time.sleep(600)
"""


def start_holder(root: Path) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(root)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    return holder


def test_a_second_start_is_refused_with_who_holds_the_lock(tmp_path: Path) -> None:
    holder = start_holder(tmp_path)
    try:
        with (
            pytest.raises(MergeMixError, match=rf"process {holder.pid} on \S+ since \d{{4}}-"),
            RunDir(tmp_path).lock("run"),
        ):
            pass
    finally:
        holder.kill()
        holder.communicate()


def test_the_lock_of_a_process_killed_by_sigkill_is_free(tmp_path: Path) -> None:
    holder = start_holder(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert holder.returncode == -signal.SIGKILL
    with RunDir(tmp_path).lock("run"):
        text = (tmp_path / "run.lock").read_text()
    assert text.startswith(f"process {os.getpid()} on ")


def test_a_lock_is_free_again_after_the_block_and_after_an_error(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "x.lock", "x")
    with pytest.raises(KeyError), lock:
        raise KeyError
    with lock:
        pass
    with Lock(tmp_path / "x.lock", "x"):
        pass


def test_locks_of_two_stages_do_not_exclude_each_other(tmp_path: Path) -> None:
    with RunDir(tmp_path).lock("search"), RunDir(tmp_path).lock("expert-math"):
        pass


def test_a_started_program_does_not_keep_the_lock(tmp_path: Path) -> None:
    with Lock(tmp_path / "x.lock", "x"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        with Lock(tmp_path / "x.lock", "x"):
            pass
    finally:
        child.kill()
        child.wait()


def test_a_forked_helper_does_not_keep_the_lock(tmp_path: Path) -> None:
    with Lock(tmp_path / "x.lock", "x"):
        child = os.fork()
        if child == 0:
            signal.pause()
    try:
        with Lock(tmp_path / "x.lock", "x"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


FORKS = """
import os, signal, sys
from pathlib import Path
from megatron_mergemix.files.lock import Lock
with Lock(Path(sys.argv[1]), "x"):
    if os.fork() == 0:
        signal.pause()
    print("locked", flush=True)
    signal.pause()
"""


def test_a_forked_helper_of_an_owner_that_was_killed_does_not_keep_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    owner = subprocess.Popen(
        [sys.executable, "-c", FORKS, str(path)], stdout=subprocess.PIPE, start_new_session=True
    )
    assert owner.stdout is not None
    try:
        assert owner.stdout.readline() == b"locked\n"
        with pytest.raises(MergeMixError, match="is under way already"), Lock(path, "x"):
            pytest.fail("two at once")
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
        with Lock(path, "x"):
            pass
    finally:
        os.killpg(owner.pid, signal.SIGKILL)


def test_asking_for_the_holder_keeps_nobody_out(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    assert run_dir.lock("run").holder() is None
    assert not run_dir.root.exists()
    holder = start_holder(run_dir.root)
    try:
        found = run_dir.lock("run").holder()
        assert found is not None
        assert found.startswith(f"process {holder.pid} on ")
    finally:
        holder.kill()
        holder.communicate()
    assert run_dir.lock("run").holder() is None
    with run_dir.lock("run"):
        pass


def test_a_lock_waits_for_who_is_merely_asking(tmp_path: Path) -> None:
    with RunDir(tmp_path).lock("run"):
        pass
    asking = os.open(tmp_path / "run.lock", os.O_RDONLY)
    fcntl.flock(asking, fcntl.LOCK_SH)
    threading.Timer(0.03, os.close, [asking]).start()
    with RunDir(tmp_path).lock("run"):
        pass
