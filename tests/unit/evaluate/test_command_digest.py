"""What a command's scores depend on, by its words."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mergemix.config.evaluate import CommandTask
from megatron_mergemix.evaluate.command_digest import command_digest


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "eval.py"
    path.write_text("print(1)")
    return path


def task(script: Path, *more: str, **settings) -> CommandTask:
    words = ["sh", str(script), *more, "{checkpoint}", "{output}"]
    return CommandTask(run=words, **{"metrics": ["a"], **settings})


def test_program_and_files_are_known_by_their_contents(script: Path) -> None:
    before = command_digest(task(script))
    assert set(before) == {"", ".file.sh", f".file.{script}"}
    script.write_text("print(2)")
    after = command_digest(task(script))
    assert {name for name in before if before[name] != after[name]} == {f".file.{script}"}


def test_a_file_behind_an_equals_sign_counts(script: Path, tmp_path: Path) -> None:
    (tmp_path / "tasks.json").write_text("{}")
    found = command_digest(task(script, f"--tasks={tmp_path}/tasks.json", str(tmp_path)))
    assert set(found) == {"", ".file.sh", f".file.{script}", f".file.{tmp_path}/tasks.json"}


def test_words_metrics_and_direction_count_and_what_starts_them_does_not(script: Path) -> None:
    texts = {
        command_digest(each)[""]
        for each in (
            task(script),
            task(script, "-x"),
            task(script, metrics=["b"]),
            task(script, stderr="e"),
            task(script, higher_is_better=False),
        )
    }
    assert len(texts) == 5
    assert command_digest(task(script, timeout=5.0, retries=2)) == command_digest(task(script))
