"""A search with a held-out loss and a command: killed while the command runs, with commands that
fail in every way, and checked on held-out items when it has ended."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megatron_mergemix.config import load_config
from megatron_mergemix.search.journal import read_journal
from megatron_mergemix.training_runs.experiment_runs import base_checkpoint, expert_checkpoints
from megatron_mergemix.trials import Trial
from tests.support import distance_command
from tests.support.processes import mergemix

pytestmark = pytest.mark.timeout(600)

KILLED_CALL = 4
FAULTS = {6: "hang", 8: "exit", 10: "no json", 12: "no metric"}
"""By the number of the call; the fourth is that of the killed job, and is done again."""

TIMEOUT = 25.0
"""Seconds; long enough for a second search to be started while a command hangs."""


@dataclass
class Story:
    """What was seen of the search."""

    words: list[str]
    run_dir: Path
    home: Path
    scratch_at_kill: list[Path] = field(default_factory=list)
    survivors: list[str] = field(default_factory=list)
    first_pid: int = 0
    second: tuple[int, str] = (0, "")
    output: str = ""
    trials: list[Trial] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)


def scratch_of(run_dir: Path) -> list[Path]:
    """Return the folders of candidates of an experiment, in memory and on disk."""
    digest = hashlib.sha256(os.path.realpath(run_dir).encode()).hexdigest()[:12]
    places = (Path("/dev/shm"), run_dir / "scratch")
    return [path for place in places for path in place.glob(f"mergemix-{digest}.*")]


def overrides(config_path: Path, home: Path) -> list[str]:
    """Return overrides that search the given experts on two replicas, with a command."""
    config = load_config(config_path)
    base = base_checkpoint(config)
    experts = {name: str(path) for name, path in expert_checkpoints(config).items()}
    words = [sys.executable, distance_command.__file__, str(home), str(base)]
    command = {
        "run": [*words, "{checkpoint}", "{output}"],
        "metrics": ["distance.l2"],
        "higher_is_better": False,
        "timeout": TIMEOUT,
    }
    settings = {
        "run_dir": str(home / "run"),
        "base": {"checkpoint": str(base)},
        "experts.checkpoints": experts,
        "parallel.tensor": 1,
        "search.trials": 11,
        "evaluate.capabilities.far": {"command": command},
        "evaluate.utility.weights": {"math": 1, "code": 1, "prose": 1, "far": 0.1},
    }
    return [f"--set={name}={json.dumps(value)}" for name, value in settings.items()]


@pytest.fixture(scope="module")
def story(trained_experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    home = tmp_path_factory.mktemp("commands")
    (home / str(KILLED_CALL)).write_text("hang")
    seen = Story(overrides(trained_experiment, home), home / "run", home)
    with mergemix(trained_experiment, "search", *seen.words, home=home) as command:
        log = seen.run_dir / "search" / "commands" / "far" / f"trial-{KILLED_CALL - 1:03d}.log"
        command.wait_until(lambda: log.exists() and "hang" in log.read_text())
        with mergemix(trained_experiment, "search", *seen.words, home=home) as second:
            seen.second = second.end(), second.stderr
        seen.first_pid = command.process.pid
        os.killpg(command.process.pid, signal.SIGKILL)
        command.end()
        seen.survivors = command.survivors()
        seen.scratch_at_kill = scratch_of(seen.run_dir)
    for call, fault in FAULTS.items():
        (home / str(call)).write_text(fault)
    with mergemix(trained_experiment, "search", *seen.words, home=home) as command:
        assert command.end() == 0, command.stderr
        seen.output = command.stdout
    seen.trials = read_journal(seen.run_dir / "search" / "trials.jsonl")[1]
    seen.result = json.loads((seen.run_dir / "search" / "result.json").read_text())
    yield seen
    assert scratch_of(seen.run_dir) == []


def test_a_job_killed_during_a_command_leaves_nobody_and_the_next_start_no_scratch(
    story: Story,
) -> None:
    assert story.survivors == []
    assert len(story.scratch_at_kill) == 1
    assert f"search: continues after {KILLED_CALL - 1} trials" in story.output
    assert scratch_of(story.run_dir) == []


def test_a_second_search_is_refused_while_the_first_lives_and_not_once_it_was_killed(
    story: Story,
) -> None:
    code, message = story.second
    assert code == 1
    assert f"is under way already: process {story.first_pid} on" in message
    assert "another run_dir" in message
    assert story.result["source"], "the start after the kill took the lock"


def test_the_command_measures_what_the_search_merged(story: Story) -> None:
    scored = [trial for trial in story.trials if trial.error is None]
    assert len(scored) >= 8
    assert scored[0].scores["far"]["distance.l2"].value == 0.0, "the base trial is the base"
    for trial in scored:
        found = trial.scores["far"]["distance.l2"].value
        assert found == pytest.approx(trial.task_vector_norm, rel=1e-5, abs=1e-6)
        assert list(trial.scores) == ["math", "code", "prose", "far"]
        assert set(trial.scores["far"]) == {"distance.l2", "tensors"}


def test_every_way_to_fail_is_a_failed_trial_and_the_search_goes_on(story: Story) -> None:
    failed = {trial.index: trial.error or "" for trial in story.trials if trial.error}
    # One call was done again, so that from then on calls are two ahead of trials.
    texts = [failed.pop(call - 2) for call in FAULTS]
    assert failed == {}
    assert "took longer than its timeout of 25 s and was killed" in texts[0]
    assert "ended with exit code 3" in texts[1]
    assert "is no JSON" in texts[2]
    assert "has no finite number 'distance.l2'; it has other." in texts[3]
    for call, text in zip(FAULTS, texts, strict=True):
        log = story.run_dir / "search" / "commands" / "far" / f"trial-{call - 2:03d}.log"
        assert str(log) in text
        assert f"call {call} {FAULTS[call]}" in log.read_text()
    assert story.result["source"]


def test_replicas_share_candidates_and_that_is_said(story: Story) -> None:
    assert "search: commands score one candidate at a time (far)" in story.output
    assert "commands: a candidate takes" in story.output


def test_the_verdict_is_checked_on_held_out_items(story: Story) -> None:
    found = story.result["held_out"]
    assert found["items"] == {"math": 3, "code": 3, "prose": 3}
    assert found["as_searched"] == {"far": "what a command scores cannot be split"}
    assert {"recommended", "base"} <= set(found["models"])
    for name, row in found["models"].items():
        assert row["held_out"] != row["searched"]
        if name != "recommended":
            gain = found["models"]["recommended"]["held_out"] - row["held_out"]
            assert row["gain_held_out"] == pytest.approx(gain)
    assert "on items that the search never saw" in story.output
    assert any("takes far from the search" in note for note in story.result["notes"])


def test_a_changed_script_is_named(story: Story, trained_experiment: Path) -> None:
    copy = story.home / "copy.py"
    copy.write_text(Path(distance_command.__file__).read_text())
    words = [word.replace(distance_command.__file__, str(copy)) for word in story.words]
    words = [word.replace(str(story.run_dir), str(story.home / "other")) for word in words]
    other = story.home / "other" / "search" / "trials.jsonl"
    with mergemix(trained_experiment, "search", *words, home=story.home) as command:
        command.wait_until(lambda: other.exists() and other.read_bytes().count(b"\n") > 1)
        os.killpg(command.process.pid, signal.SIGKILL)
    copy.write_text(copy.read_text() + "# changed\n")
    with mergemix(trained_experiment, "search", *words, home=story.home) as command:
        assert command.end() == 1
        assert f"something else: evaluate.far.file.{copy}: " in command.stderr


# ---- mergemix evaluate, on the same experiment ----


@pytest.fixture(scope="module")
def evaluated(story: Story, trained_experiment: Path) -> tuple[list[dict[str, Any]], str]:
    """Return what ``mergemix evaluate`` says of a handful of models."""
    expert = expert_checkpoints(load_config(trained_experiment))["code"]
    alpha = story.trials[-1].merge_weights
    what = [
        *("base", "expert:math", "--mixture", "uniform", "--mixture", "learned"),
        *("--alpha", *(f"{name}={weight!r}" for name, weight in alpha.items())),
        *("--checkpoint", str(expert), "--json", "-"),
    ]
    words = ("evaluate", *what, *story.words)
    with mergemix(trained_experiment, *words, home=story.home) as command:
        assert command.end() == 0, command.stderr
        return json.loads(command.stdout), command.stderr


def test_models_are_scored_as_candidates_were(story: Story, evaluated) -> None:
    rows = {row["name"].split()[0]: row for row in evaluated[0] if "mixture" not in row["name"]}
    rows |= {row["name"]: row for row in evaluated[0]}
    last = story.trials[-1]
    uniform = next(t for t in story.trials if t.purpose == "prior:uniform" or _is_uniform(t))
    recommended = story.result["alternatives"][story.result["source"]]["trial"]
    learned = next(trial for trial in story.trials if trial.index == recommended)
    for name, trial in (
        ("base", story.trials[0]),
        ("mixture uniform", uniform),
        ("mixture learned", learned),
        ("alpha", last),
    ):
        for capability, metrics in trial.scores.items():
            for metric, score in metrics.items():
                found = rows[name]["scores"][capability][metric]["value"]
                assert found == pytest.approx(score.value, rel=1e-5, abs=1e-6), (name, capability)
    assert rows["mixture learned"]["utility"] == pytest.approx(story.result["utility"], rel=1e-4)
    assert rows["expert"]["scores"]["far"]["distance.l2"]["value"] > 0


def _is_uniform(trial: Trial) -> bool:
    shares = list(trial.mixture.values())
    return bool(shares) and max(shares) - min(shares) < 1e-9


def test_what_is_on_record_is_shown_and_not_scored_again(
    story: Story, trained_experiment: Path, evaluated
) -> None:
    calls = (story.home / "calls").read_text()
    words = ("evaluate", "base", "--json", str(story.home / "found.json"), *story.words)
    with mergemix(trained_experiment, *words, home=story.home) as command:
        assert command.end() == 0, command.stderr
        assert "evaluate: base: on record already" in command.stdout
        assert "far distance.l2" in command.stdout
    assert (story.home / "calls").read_text() == calls
    (row,) = json.loads((story.home / "found.json").read_text())
    assert row["scores"] == evaluated[0][0]["scores"]
    assert {"checkpoint", "evaluate.math", "evaluate.far"} <= set(row["digests"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to evaluate: name base, experts or expert:NAME, or give --mixture"),
        (["expert:maths"], "'maths' is no expert. Did you mean math?"),
        (["--mixture", "unifrom"], "mixture is 'unifrom', expected one of learned, uniform"),
        (["--mixture", "math=0.5,code=0.4"], "shares sum to 0.9, expected 1"),
        (["--alpha", "math=1", "cod=2"], "'cod' is no expert; there are math, code, prose"),
        (["--alpha", "math=nan"], "'nan' is no finite number"),
        (["--checkpoint", "/no/where"], "/no/where"),
    ],
)
def test_what_names_no_model_is_refused_before_anything_starts(
    story: Story, trained_experiment: Path, words: list[str], message: str, capsys
) -> None:
    from megatron_mergemix.cli import main

    assert main(["evaluate", str(trained_experiment), *words, *story.words]) == 1
    assert message in capsys.readouterr().err
