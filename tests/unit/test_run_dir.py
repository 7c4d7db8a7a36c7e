"""Paths, files that appear whole, and the lock."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_mergemix import run_dir as module
from megatron_mergemix.errors import MergeMixError
from megatron_mergemix.run_dir import Lock, RunDir, publish_json, publish_text


def test_every_path_lies_below_the_root_and_nothing_is_created(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    paths = {
        run_dir.base: "base",
        run_dir.expert("math"): "experts/math",
        run_dir.reference("uniform"): "references/uniform",
        run_dir.cache: "cache",
        run_dir.config: "config.json",
        run_dir.trials: "search/trials.jsonl",
        run_dir.result: "search/result.json",
        run_dir.blend: "blend",
        run_dir.validation: "validate/result.json",
        run_dir.report: "report.html",
        run_dir.slurm: "slurm",
        run_dir.tensorboard("experts/math"): "tensorboard/experts/math",
        run_dir.log("search"): "logs/search.log",
    }
    assert {path.relative_to(run_dir.root).as_posix() for path in paths} == set(paths.values())
    assert not run_dir.root.exists()


def test_published_text_is_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    publish_text(path, "one\n")
    publish_text(path, "zwei \u00fc\n")
    assert path.read_bytes() == b"zwei \xc3\xbc\n"
    assert os.listdir(path.parent) == ["file.txt"]


def test_a_failed_publish_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    publish_json(path, {"a": 0.1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        publish_json(path, {"a": float("nan")})
    with pytest.raises(UnicodeEncodeError):
        publish_text(path, "\ud800")
    assert json.loads(path.read_text()) == {"a": 0.1}
    assert os.listdir(tmp_path) == ["result.json"]


def test_publish_syncs_the_file_before_and_the_folder_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(file: int) -> None:
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{file}") else "file")
        fsync(file)

    def watched_replace(old: Path, new: Path) -> None:
        events.append("rename")
        replace(old, new)

    monkeypatch.setattr(module.os, "fsync", watched_fsync)
    monkeypatch.setattr(module.os, "replace", watched_replace)
    publish_text(tmp_path / "a", "x")
    assert events == ["file", "rename", "folder"]


def test_a_refusing_file_system_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file, not a folder")
    with pytest.raises(MergeMixError, match=r"cannot write .*a.json: .*run must be writable"):
        publish_json(tmp_path / "run" / "a.json", {})
    with (
        pytest.raises(MergeMixError, match=r"cannot write .*run.lock: .*must be writable"),
        RunDir(tmp_path / "run").lock("run"),
    ):
        pass


# A child that takes the lock, says so, and waits to be killed.
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
from megatron_mergemix.run_dir import Lock
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


def test_settings_go_on_record_but_not_over_those_of_a_verb_at_work(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.put_on_record({"seed": 1})
    assert json.loads(run_dir.config.read_text()) == {"seed": 1}
    with run_dir.lock("run"):
        run_dir.put_on_record({"seed": 7})
    assert json.loads(run_dir.config.read_text()) == {"seed": 1}
    run_dir.put_on_record({"seed": 7})
    assert json.loads(run_dir.config.read_text()) == {"seed": 7}
