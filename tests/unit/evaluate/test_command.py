"""Commands on candidates that are really written: what they get, and how they fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_mergemix.config.evaluate import CommandTask
from megatron_mergemix.errors import ConfigError, EvaluationError
from megatron_mergemix.evaluate.command import CommandEvaluator, numbers_in
from megatron_mergemix.evaluate.proxy import MergedFrom
from megatron_mergemix.evaluate.scratch import Scratch
from megatron_mergemix.trials import Score, Scores
from tests.support.checkpoint_family import write_family


class Merged:
    """A proxy that is a merge on disk and nothing else."""

    def __init__(self, merged_from: MergedFrom) -> None:
        self.merged_from = merged_from


class Bench:
    """Runs scripts of Python as commands."""

    def __init__(self, home: Path) -> None:
        folders, _ = write_family(home / "family")
        self.home, self.memory = home, home / "memory"
        self.memory.mkdir()
        base = folders.pop("base")
        weights = {"a": 0.75, "b": 0.25}
        self.proxy: Any = Merged(MergedFrom(base, {n: (p, weights[n]) for n, p in folders.items()}))

    def task(self, script: str, **settings: Any) -> CommandTask:
        words = [
            sys.executable,
            "-c",
            f"import json, os, sys\n{script}",
            "{checkpoint}",
            "{output}",
        ]
        return CommandTask(run=words, **{"metrics": ["score"], **settings})

    def evaluator(self, at_once: int = 1, **tasks: CommandTask) -> CommandEvaluator:
        scratch = Scratch(self.home / "run", self.home / "disk", self.memory)
        return CommandEvaluator(tasks, scratch, self.home / "logs", at_once)

    def score(self, at_once: int = 1, **tasks: CommandTask) -> Scores:
        evaluator = self.evaluator(at_once, **tasks)
        evaluator.begin("trial-007")
        return evaluator.evaluate(self.proxy)

    def refusal(self, script: str, **settings: Any) -> str:
        with pytest.raises(EvaluationError) as caught:
            self.score(tests=self.task(script, **settings))
        assert list(self.memory.iterdir()) == [], "scratch is left"
        return str(caught.value)

    def log(self, name: str = "tests") -> str:
        return (self.home / "logs" / name / "trial-007.log").read_text()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def writes(value: Mapping[str, Any]) -> str:
    return f"json.dump({dict(value)!r}, open(sys.argv[2], 'w'))"


def test_numbers_of_the_json_become_scores_those_of_the_utility_first(bench: Bench) -> None:
    found = {"n": 3, "suite": {"pass": 0.5, "error": 0.1, "why": "text", "ok": True}, "seen": [1]}
    task = bench.task(writes(found), metrics=["suite.pass"], stderr="suite.error")
    scores = bench.score(tests=task)
    assert list(scores["tests"]) == ["suite.pass", "n"]
    assert scores["tests"]["suite.pass"] == Score(0.5, 0.1, 1, "", True)
    assert scores["tests"]["n"] == Score(3.0, None, 1, "", True)
    lower = bench.score(tests=bench.task(writes({"score": 1}), higher_is_better=False))
    assert not lower["tests"]["score"].higher_is_better


def test_the_command_gets_the_root_that_merge_writes(bench: Bench) -> None:
    script = (
        "root = sys.argv[1]\nprint(sorted(os.listdir(root)), sorted(os.listdir(root + '/release')))"
    )
    bench.score(tests=bench.task(f"{script}\n{writes({'score': 1})}"))
    assert "['latest_checkpointed_iteration.txt', 'mergemix.json', 'release']" in bench.log()
    assert "'.metadata'" in bench.log()
    assert "'common.pt'" in bench.log()


def test_one_written_candidate_serves_all_commands_at_the_same_time(bench: Bench) -> None:
    """Each waits for the file that the other makes."""
    meet = (
        "import pathlib, time\nroot = pathlib.Path(sys.argv[1])\n"
        "(root / sys.argv[2].split('/')[-1]).touch()\n"
        "while len(list(root.glob('*.json'))) < 3: time.sleep(0.01)\n"  # mergemix.json is one
    )
    task = bench.task(meet + writes({"score": 1}), timeout=20.0)
    assert set(bench.score(at_once=2, one=task, other=task)) == {"one", "other"}


def test_no_more_commands_run_at_the_same_time_than_may(bench: Bench) -> None:
    """Each fails where it finds the mark of another that has not ended."""
    alone = (
        "import pathlib, time\nmark = pathlib.Path(sys.argv[1]).parent / 'at-work'\n"
        "mark.touch(exist_ok=False)\ntime.sleep(0.5)\nmark.unlink()\n"
    )
    task = bench.task(alone + writes({"score": 1}), timeout=20.0)
    assert set(bench.score(at_once=1, one=task, other=task)) == {"one", "other"}
    with pytest.raises(EvaluationError, match="FileExistsError"):
        bench.score(at_once=2, one=task, other=task)


def test_an_exit_code_is_told_with_the_log_and_its_last_lines(bench: Bench) -> None:
    text = bench.refusal("print('so far', flush=True)\nprint('bad', file=sys.stderr)\nsys.exit(3)")
    assert text.startswith("the command of capability tests ended with exit code 3. Its output is")
    assert text.endswith("logs/tests/trial-007.log; the end of it:\n  so far\n  bad")


def test_a_signal_is_named(bench: Bench) -> None:
    text = bench.refusal("import signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    assert "was killed by signal 11 (SIGSEGV)" in text


def test_a_program_that_is_not_there_is_said(bench: Bench) -> None:
    task = CommandTask(run=["/no/such", "{checkpoint}", "{output}"], metrics=["score"])
    with pytest.raises(EvaluationError, match="cannot be started: /no/such: No such file"):
        bench.score(tests=task)


def test_an_output_that_is_missing_or_no_json_is_said(bench: Bench) -> None:
    assert "wrote no tests.json to {output}" in bench.refusal("pass")
    assert "is no JSON: Expecting value" in bench.refusal("open(sys.argv[2], 'w').write('no')")
    assert "expected a mapping, found list" in bench.refusal("open(sys.argv[2], 'w').write('[1]')")


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')", "'0.5'", "True", "None"])
def test_a_metric_that_is_no_finite_number_is_named_with_what_is_there(bench, value) -> None:
    text = bench.refusal(f"json.dump({{'score': {value}, 'b': 1}}, open(sys.argv[2], 'w'))")
    assert "its JSON has no finite number 'score'; it has b. Its output is in" in text


def test_a_command_is_started_again_as_often_as_allowed(bench: Bench) -> None:
    mark = bench.home / "mark"
    script = f"print('try')\nseen = os.path.exists({str(mark)!r}); open({str(mark)!r}, 'w')\n"
    script += f"if not seen: sys.exit(1)\n{writes({'score': 2})}"
    assert bench.score(tests=bench.task(script, retries=1))["tests"]["score"].value == 2
    assert bench.log().count("\ntry\n") == 2
    text = bench.refusal("sys.exit(4)", retries=2)
    assert text.endswith("(attempt 3 of 3)")
    assert bench.log().count("--- ") == 3, "the log is that of this candidate alone"


def test_words_reach_the_command_as_they_are(bench: Bench) -> None:
    words = [
        sys.executable,
        "-c",
        "import json,sys; json.dump({'n': len(sys.argv)}, open(sys.argv[1], 'w'))",
        "{output}",
        "a b; $HOME *",
        "--at={checkpoint}",
    ]
    scores = bench.score(tests=CommandTask(run=words, metrics=["n"]))
    assert scores["tests"]["n"].value == 4


def test_the_command_does_not_take_itself_for_a_rank(bench: Bench, monkeypatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    names = "('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'TORCHELASTIC_RUN_ID')"
    script = f"there = [n for n in {names} if n in os.environ]\n"
    script += "json.dump({'score': len(there), 'device': int(os.environ['CUDA_VISIBLE_DEVICES'])},"
    script += " open(sys.argv[2], 'w'))"
    scores = bench.score(tests=bench.task(script))
    assert scores["tests"]["score"].value == 0
    assert scores["tests"]["device"].value == 3


def numbers(log: Path) -> list[int]:
    """Return the lines of a log that are numbers: what commands say that they started."""
    text = log.read_text() if log.exists() else ""
    return [int(line) for line in text.splitlines() if line.isdecimal()]


LEAVES_CHILDREN = """
import subprocess, time
ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
for apart in (False, True):
    child = subprocess.Popen([sys.executable, "-c", ignore, "MARK"], start_new_session=apart)
    print(child.pid, flush=True)
"""


def test_a_timeout_ends_everything_that_was_started(bench: Bench, monkeypatch) -> None:
    monkeypatch.setattr("megatron_mergemix.evaluate.command.GRACE", 0.3)
    started = time.monotonic()
    text = bench.refusal(LEAVES_CHILDREN + "time.sleep(600)", timeout=1.0)
    assert time.monotonic() - started < 8
    assert "took longer than its timeout of 1 s and was killed" in text
    pids = numbers(bench.home / "logs" / "tests" / "trial-007.log")
    assert len(pids) == 2
    assert not any(map(psutil.pid_exists, pids))


def test_nothing_stays_behind_a_command_that_ended_well(bench: Bench, monkeypatch) -> None:
    monkeypatch.setattr("megatron_mergemix.evaluate.command.GRACE", 0.3)
    bench.score(tests=bench.task(LEAVES_CHILDREN + writes({"score": 1})))
    pids = numbers(bench.home / "logs" / "tests" / "trial-007.log")
    assert len(pids) == 2
    assert not any(map(psutil.pid_exists, pids))


KILLED = """
import sys
from pathlib import Path
from megatron_mergemix.evaluate import command
from tests.unit.evaluate.test_command import LEAVES_CHILDREN, Bench
command.GRACE = 0.3
bench = Bench(Path(sys.argv[1]))
bench.score(tests=bench.task(LEAVES_CHILDREN + "time.sleep(600)"))
"""


def test_a_job_killed_with_9_takes_its_commands_along_and_the_next_its_scratch(
    tmp_path: Path,
) -> None:
    home = tmp_path / "killed"
    home.mkdir()
    job = subprocess.Popen([sys.executable, "-c", KILLED, str(home)], start_new_session=True)
    log = home / "logs" / "tests" / "trial-007.log"
    deadline = time.monotonic() + 60
    pids: list[int] = []
    while len(pids) < 2 and time.monotonic() < deadline:
        pids = numbers(log)
        time.sleep(0.05)
    assert len(pids) == 2
    assert all(map(psutil.pid_exists, pids))
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    (left,) = (home / "memory").iterdir()
    assert (left / "candidate" / "release").is_dir()
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(psutil.pid_exists, pids))
    Scratch(home / "other", home / "disk", home / "memory")
    assert list((home / "memory").iterdir()) == [left], "that of another experiment stays"
    Scratch(home / "run", home / "disk", home / "memory")
    assert list((home / "memory").iterdir()) == []


def test_a_command_that_writes_to_a_file_among_its_words_is_refused(bench: Bench) -> None:
    cache = bench.home / "cache.db"
    script = f"open({str(cache)!r}, 'a').write('seen')\n{writes({'score': 1})}"
    task = bench.task(script)
    task = task.model_copy(update={"run": [*task.run, f"--cache={cache}"]})
    for _ in range(2):  # it is not there yet; it grows
        with pytest.raises(ConfigError, match=rf"tests: while the command ran, {cache} changed"):
            bench.score(tests=task)


def test_a_command_whose_watcher_is_killed_does_not_outlive_it(bench: Bench) -> None:
    script = (
        "import signal, time\nprint(os.getpid(), flush=True)\n"
        "os.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(60)"
    )
    assert "was lost: what watches it was killed by signal 9" in bench.refusal(script)
    (pid,) = numbers(bench.home / "logs" / "tests" / "trial-007.log")
    deadline = time.monotonic() + 30
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not psutil.pid_exists(pid)


def test_numbers_have_dotted_names_once() -> None:
    assert numbers_in({"a": {"b": {"c": 1}}, "d,e": 2.5}) == {"a.b.c": 1.0, "d,e": 2.5}
    with pytest.raises(ValueError, match=r"a\.b is there twice"):
        numbers_in({"a.b": 1, "a": {"b": 2}})
    assert numbers_in(json.loads('{"a": 1e999, "b": ' + "9" * 400 + "}")) == {}
