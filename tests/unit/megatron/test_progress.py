"""Progress in a log and in TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_mergemix.megatron import progress
from megatron_mergemix.megatron.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list whose first number is the time."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {
        tag: [(event.step, event.value) for event in reader.Scalars(tag)]
        for tag in reader.Tags()["scalars"]
    }


def test_a_log_gets_a_line_every_few_seconds_and_the_last_one(
    tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("experts/math", 40, 0, tmp_path) as bar:
        for step in range(1, 41):
            clock[0] += 1.0
            bar.advance(step, 100, "tokens/s", loss=4.0 / step)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "experts/math: 1/40  loss 4  100 tokens/s  39 s left"
    assert lines[1] == "experts/math: 6/40  loss 0.6667  100 tokens/s  34 s left"
    assert lines[-1] == "experts/math: 40/40  loss 0.1  100 tokens/s  0 s left"
    assert len(lines) == 9


def test_other_processes_are_told_the_step_when_a_line_is_due(
    tmp_path: Path, clock: list[float]
) -> None:
    record = tmp_path / "progress.json"
    told = []
    with Progress("base", 8, 0, tmp_path / "scalars", record) as bar:
        for step in range(1, 9):
            bar.advance(step)
            clock[0] += 2.0
            told.append(json.loads(record.read_text()))
    assert [each["step"] for each in told] == [1, 1, 1, 4, 4, 4, 7, 8]
    assert told[0] == {"step": 1, "total": 8}


def test_a_continued_run_is_timed_from_where_it_continues(
    tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("base", 30, 20, tmp_path) as bar:
        clock[0] += 4.0
        bar.advance(22, 10, "tokens/s", loss=2.0)
    assert capsys.readouterr().out == "base: 22/30  loss 2  5 tokens/s  16 s left\n"


def test_every_call_is_a_scalar(tmp_path: Path, clock: list[float]) -> None:
    with Progress("base", 3, 0, tmp_path) as bar:
        for step in (1, 2, 3):
            clock[0] += 0.5
            bar.advance(step, 8, "tokens/s", loss=1.0 / step, grad_norm=0.5)
    found = scalars(tmp_path)
    assert found["loss"] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert found["grad_norm"] == [(1, 0.5), (2, 0.5), (3, 0.5)]
    assert found["tokens/s"] == [(1, 16.0), (2, 16.0), (3, 16.0)]


def test_scalars_of_steps_that_are_done_again_are_replaced(
    tmp_path: Path, clock: list[float]
) -> None:
    """A run killed after step 4 continues from its save of step 2: 3 and 4 come twice."""
    for first, last, value in ((0, 4, 1.0), (2, 6, 2.0)):
        clock[0] += 10.0  # the files are named and ordered by their second
        with Progress("base", 6, first, tmp_path) as bar:
            for step in range(first + 1, last + 1):
                bar.advance(step, loss=value)
    assert scalars(tmp_path)["loss"] == [(s, 1.0) for s in (1, 2)] + [
        (s, 2.0) for s in (3, 4, 5, 6)
    ]


def test_other_ranks_show_and_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "rank", lambda: 1)
    with Progress("base", 2, 0, tmp_path / "none") as bar:
        bar.advance(2, 1, "tokens/s", loss=1.0)
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "none").exists()
