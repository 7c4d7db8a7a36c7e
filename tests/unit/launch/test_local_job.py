"""How the failure of a job is told."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mergemix.config import load_config
from megatron_mergemix.launch import local_job
from megatron_mergemix.launch.local_job import _explain
from tests.support.untrained import write_config

# As torchrun (torch 2.13) writes it, shortened.
SUMMARY = """
Traceback (most recent call last):
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
megatron_mergemix.jobs.worker FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-23_19:54:28
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 16706)
  error_file: <N/A>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-23_19:54:28
  host      : localhost
  rank      : {rank} (local_rank: 1)
  exitcode  : {code} (pid: 16707)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 16707
============================================================
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "search.log"
    path.write_text("")
    return path


def explain(log: Path, code: int = 1, start: int = 0, *, alone: bool = False) -> str:
    return _explain("search", code, log.with_suffix(".error"), log, start, alone)


def test_what_a_rank_left_is_the_message(log: Path) -> None:
    log.write_text(SUMMARY.format(rank=1, code=-9))
    log.with_suffix(".error").write_text("expert math is NaN. Train it again.\n")
    assert explain(log) == "expert math is NaN. Train it again."


def test_a_killed_rank_is_named_with_its_signal(log: Path) -> None:
    log.write_text("warnings\n" + SUMMARY.format(rank=3, code=-9))
    assert explain(log) == (
        "rank 3 of the search job was killed by signal 9 (SIGKILL). The kernel does that when "
        f"memory runs out: see `dmesg`. Start it again and it continues. Its output is in {log}."
    )


def test_only_a_kill_points_at_the_memory(log: Path) -> None:
    log.write_text(SUMMARY.format(rank=0, code=-11))
    assert explain(log).startswith("rank 0 of the search job was killed by signal 11 (SIGSEGV).")
    assert "memory" not in explain(log)


def test_a_rank_that_was_alone_is_named_with_its_signal(log: Path) -> None:
    message = explain(log, code=-9, alone=True)
    assert message.startswith("rank 0 of the search job was killed by signal 9 (SIGKILL).")
    assert "no message" in explain(log, alone=True)


def test_an_earlier_failure_in_the_log_is_not_told_again(log: Path) -> None:
    log.write_text(SUMMARY.format(rank=3, code=-9))
    start = log.stat().st_size
    with log.open("a") as file:
        file.write("what this job wrote\n")
    message = explain(log, code=-15, start=start)
    assert message == (
        "the search job ended with signal 15 (SIGTERM) and no message. Start it again and it "
        f"continues. The end of {log}:\nwhat this job wrote"
    )


def test_a_rank_that_ended_by_itself_shows_the_end_of_the_log(log: Path) -> None:
    log.write_text("\n".join(f"line {number}" for number in range(40)))
    message = explain(log)
    assert "ended with exit code 1 and no message" in message
    assert message.splitlines()[1:] == [f"line {number}" for number in range(25, 40)]


def test_ranks_are_given_the_settings_on_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(write_config(tmp_path))
    commands: list[list[str]] = []
    monkeypatch.setattr(local_job.subprocess, "Popen", lambda words, **rest: commands.append(words))
    monkeypatch.setattr(local_job, "wait_for", lambda process: 0)
    local_job.run_job(config, "train", ["base", "experts/math"])
    [command] = commands
    job = command.index("train")
    assert command[job + 1 : job + 4] == [
        str(config.run_dir / "config.json"),
        "base",
        "experts/math",
    ]
    assert not any(str(word).endswith("mix.yaml") for word in command)


@pytest.mark.parametrize(("processes", "launched"), [(1, False), (2, True)])
def test_a_rank_that_is_alone_starts_without_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int, launched: bool
) -> None:
    config = load_config(write_config(tmp_path, {"parallel": {"processes": processes}}))
    monkeypatch.setenv("RANK", "5")  # of a job that this one is started in
    started: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(
        local_job.subprocess, "Popen", lambda words, *, env, **rest: started.append((words, env))
    )
    monkeypatch.setattr(local_job, "wait_for", lambda process: 0)
    local_job.run_job(config, "search")
    [(words, environment)] = started
    assert ("torch.distributed.run" in words) is launched
    assert launched or (environment["RANK"], environment["WORLD_SIZE"]) == ("0", "1")


TRAPS = """
import signal, sys, time
def save(*_):
    open(sys.argv[1], "w").write("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""
WAITS = """
import subprocess, sys
from megatron_mergemix.launch.local_job import wait_for
wait_for(subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]]))
"""


def test_a_sigterm_is_handed_on_and_waited_for(tmp_path: Path) -> None:
    words = [sys.executable, "-c", WAITS, TRAPS, str(tmp_path / "file")]
    verb = subprocess.Popen(words, stdout=subprocess.PIPE)
    assert verb.stdout is not None
    assert verb.stdout.readline() == b"ready\n"
    verb.send_signal(signal.SIGTERM)
    assert verb.wait(timeout=60) == 128 + signal.SIGTERM
    assert (tmp_path / "file").read_text() == "saved"


def test_a_rank_that_is_alone_does_not_look_for_the_agent_of_another_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    environment = local_job._environment(load_config(write_config(tmp_path)))
    assert "TORCHELASTIC_USE_AGENT_STORE" not in environment
