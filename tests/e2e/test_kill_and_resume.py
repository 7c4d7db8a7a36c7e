"""Killed with -9 in every stage and started again, an experiment ends as if nothing had happened.

One experiment is run twice over the same data: straight through, and in five starts, of which
four are killed: in the base, in the third expert, at trial 17 and while the blend is written.
Each time something else is killed: the process group, one rank, the launching process alone, the
process itself in the middle of a file.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mergemix.search.journal import read_journal
from megatron_mergemix.trials import Trial
from tests.support.datasets import make_domains
from tests.support.experiment import write_experiment
from tests.support.forked_jobs import run_verb
from tests.support.processes import Command, mergemix
from tests.support.weights import read_weights

pytestmark = pytest.mark.timeout(1200)

EXPERTS = ("math", "code", "prose", "web")
RUNS = ("base", *(f"experts/{name}" for name in EXPERTS))
KILLED_TRIAL = 17

# Dies when half of the third blend file is in its temporary file.
DIES_IN_BLEND = """
import os, signal, sys
from pathlib import Path
from megatron_mergemix import cli
from megatron_mergemix.data import blend_files
from megatron_mergemix.files import publishing

def dying(path, text):
    with publishing.publishing(path) as temporary:
        if path.name == "per_split_data_args.json":
            temporary.write_text(text[: len(text) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        temporary.write_text(text)

blend_files.publish_text = dying
cli.main(["run", *sys.argv[1:]])
"""


@dataclass
class Story:
    """What was seen on the way: outputs of the starts, and what was finished at each kill."""

    outputs: list[str] = field(default_factory=list)
    survivors: dict[str, list[str]] = field(default_factory=dict)
    marks: dict[str, tuple[int, int]] = field(default_factory=dict)
    journal: bytes = b""
    trials_at_kill: int = 0
    rank_killed: tuple[int, str, str] = (0, "", "")
    blend_at_kill: list[str] = field(default_factory=list)

    def remember_finished(self, run_dir: Path) -> None:
        """Note inode and time of what says that a run is done, as first seen."""
        for name in RUNS:
            path = run_dir / name / "finished.json"
            if path.exists():
                self.marks.setdefault(name, _mark(path))


def _mark(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the YAML of four domains and 40 trials; starts differ in ``run_dir`` alone."""
    directory = tmp_path_factory.mktemp("killed")
    web = make_domains(directory / "more", ["web"], 20000)
    changes: Mapping[str, Any] = {
        "domains": {"web": {"prefixes": [web["web"]]}},
        "base": {"train": {"tokens": 30720, "lr": 5e-3, "warmup_steps": 2}},  # 60 steps
        "experts": {"tokens": 15360, "lr": 2e-3},  # 30 steps
        "search": {"trials": 40},
        "references": {},
    }
    return write_experiment(directory, changes)


@pytest.fixture(scope="module")
def straight(config: Path) -> Path:
    """Run without any interruption; return the run_dir."""
    run_dir = config.parent / "straight"
    run_verb(config, "run", f"--set=run_dir={run_dir}")
    return run_dir


@pytest.fixture(scope="module")
def killed(config: Path) -> tuple[Path, Story]:
    """Run in five starts; return the run_dir and what was seen."""
    run_dir = config.parent / "killed"
    story = Story()
    words = ("run", f"--set=run_dir={run_dir}")
    with mergemix(config, *words) as command:
        _kill_the_group_in_the_base(command, run_dir, story)
    with mergemix(config, *words) as command:
        _kill_one_rank_in_the_third_expert(command, run_dir, story)
    with mergemix(config, *words) as command:
        _kill_the_launcher_at_a_trial(command, run_dir, story)
    with Command(["-c", DIES_IN_BLEND, str(config), words[1]], config.parent) as command:
        assert command.end() == -signal.SIGKILL, command.stderr
        story.survivors["blend"] = command.survivors()
        story.blend_at_kill = sorted(path.name for path in (run_dir / "blend").iterdir())
        story.remember_finished(run_dir)
        story.outputs.append(command.stdout)
    with mergemix(config, *words) as command:
        assert command.end() == 0, command.stderr
        story.outputs.append(command.stdout)
    return run_dir, story


def _kill_the_group_in_the_base(command: Command, run_dir: Path, story: Story) -> None:
    save = run_dir / "base" / "checkpoints" / "iter_0000010"
    command.wait_until(save.exists)
    os.killpg(command.process.pid, signal.SIGKILL)
    command.end()
    story.survivors["base"] = command.survivors()
    assert not (run_dir / "base" / "finished.json").exists(), "the kill came too late"


def _kill_one_rank_in_the_third_expert(command: Command, run_dir: Path, story: Story) -> None:
    third = run_dir / "experts" / EXPERTS[2]
    command.wait_until((third / "checkpoints" / "iter_0000005").exists)
    command.rank(1).kill()
    code = command.end(timeout=60)
    story.survivors["expert"] = command.survivors()
    story.rank_killed = code, command.stderr, str(run_dir / "logs" / "train.log")
    story.outputs.append(command.stdout)
    assert not (third / "finished.json").exists(), "the kill came too late"
    story.remember_finished(run_dir)


def _kill_the_launcher_at_a_trial(command: Command, run_dir: Path, story: Story) -> None:
    journal = run_dir / "search" / "trials.jsonl"

    def lines() -> int:
        return journal.read_bytes().count(b"\n") if journal.exists() else 0

    command.wait_until(lambda: lines() > KILLED_TRIAL)  # the header is a line, too
    command.process.kill()
    command.end()
    story.survivors["search"] = command.survivors()
    story.journal = journal.read_bytes()
    story.trials_at_kill = lines() - 1
    story.outputs.append(command.stdout)
    story.remember_finished(run_dir)
    assert story.trials_at_kill < 40, "the kill came too late"


# ---- nobody is left behind ----


@pytest.mark.parametrize("stage", ["base", "expert", "search", "blend"])
def test_no_process_outlives_a_kill(killed: tuple[Path, Story], stage: str) -> None:
    assert killed[1].survivors[stage] == []


def test_a_killed_rank_ends_the_job_with_one_clear_message(killed: tuple[Path, Story]) -> None:
    code, stderr, log = killed[1].rank_killed
    assert code == 1
    assert stderr.startswith("error: rank 1 of the train job was killed by signal 9 (SIGKILL).")
    assert "Start it again and it continues." in stderr
    assert log in stderr
    assert stderr.count("error:") == 1
    assert "Traceback" not in stderr


# ---- nothing is done twice ----


def test_runs_continue_from_their_last_save(killed: tuple[Path, Story]) -> None:
    second, third, fourth, last = killed[1].outputs
    assert "base: continues from step 10" in second
    assert f"experts/{EXPERTS[2]}: continues from step 5" in third
    assert f"search: continues after {killed[1].trials_at_kill} trials" in fourth
    assert "search: already done" in last


def test_finished_runs_are_not_touched_again(killed: tuple[Path, Story]) -> None:
    run_dir, story = killed
    assert set(story.marks) == set(RUNS)
    for name, mark in story.marks.items():
        assert _mark(run_dir / name / "finished.json") == mark, name
    for name in RUNS[:3]:
        assert f"{name}: already trained" in story.outputs[2]


def test_the_journal_only_grew_and_holds_every_trial_once(killed: tuple[Path, Story]) -> None:
    run_dir, story = killed
    whole_lines = story.journal[: story.journal.rfind(b"\n") + 1]
    assert story.trials_at_kill >= KILLED_TRIAL
    assert (run_dir / "search" / "trials.jsonl").read_bytes().startswith(whole_lines)
    indices = [trial.index for trial in _trials(run_dir)]
    assert indices == list(range(len(indices)))
    assert len(indices) > 40


# ---- the result is the same ----


@pytest.mark.parametrize("name", RUNS)
def test_weights_are_bit_equal(straight: Path, killed: tuple[Path, Story], name: str) -> None:
    expected, found = _final_weights(straight, name), _final_weights(killed[0], name)
    assert expected.keys() == found.keys()
    for tensor, value in expected.items():
        np.testing.assert_array_equal(found[tensor], value, err_msg=tensor)


def _final_weights(run_dir: Path, name: str) -> dict[str, np.ndarray]:
    finished = json.loads((run_dir / name / "finished.json").read_text())
    return read_weights(run_dir / name / finished["checkpoint"])


def test_trials_are_equal_but_for_their_seconds(straight: Path, killed: tuple[Path, Story]) -> None:
    assert _trials(straight) == _trials(killed[0])


def _trials(run_dir: Path) -> list[Trial]:
    _, trials = read_journal(run_dir / "search" / "trials.jsonl")
    return [dataclasses.replace(trial, seconds={}) for trial in trials]


def test_results_are_equal_but_for_their_seconds(
    straight: Path, killed: tuple[Path, Story]
) -> None:
    expected, found = (
        json.loads((run_dir / "search" / "result.json").read_text())
        for run_dir in (straight, killed[0])
    )
    del expected["seconds"], found["seconds"]
    assert found == expected


def test_a_blend_that_was_being_written_does_not_look_finished(
    killed: tuple[Path, Story],
) -> None:
    visible = [name for name in killed[1].blend_at_kill if not name.startswith(".")]
    assert visible == ["data_args.txt", "data_path.txt"]


def test_blend_files_are_byte_equal(straight: Path, killed: tuple[Path, Story]) -> None:
    expected, found = _blend(straight), _blend(killed[0])
    assert set(found) == {
        "blend.yaml",
        "data_args.txt",
        "data_path.txt",
        "per_split_data_args.json",
    }
    assert found == expected


def _blend(run_dir: Path) -> dict[str, str]:
    """Return the files by name; ``blend.yaml`` names its own folder."""
    return {
        path.name: path.read_text().replace(str(run_dir), "RUN_DIR")
        for path in (run_dir / "blend").iterdir()
        if not path.name.startswith(".")
    }
