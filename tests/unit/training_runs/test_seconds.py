"""Seconds of a run that was started more than once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_mergemix.training_runs import seconds
from megatron_mergemix.training_runs.seconds import begin, worked


class Clock:
    """Stands in for the time; a test moves it."""

    now = 1000.0

    def time(self) -> float:
        return self.now

    def write(self, path: Path) -> None:
        """Write a file at the present time."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (self.now, self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(seconds, "time", clock)
    return clock


def test_one_start_counts_until_now(tmp_path: Path, clock: Clock) -> None:
    assert worked(tmp_path) == 0.0
    begin(tmp_path)
    clock.now += 7
    assert worked(tmp_path) == 7.0


@pytest.mark.parametrize(
    "sign",
    [
        "progress.json",
        "checkpoints/latest_checkpointed_iteration.txt",
        "checkpoints/iter_0000006",
    ],
)
def test_a_killed_start_counts_until_its_last_words_and_the_queue_not_at_all(
    tmp_path: Path, clock: Clock, sign: str
) -> None:
    begin(tmp_path)
    clock.now += 20
    clock.write(tmp_path / sign)
    clock.now += 3  # killed, its last steps lost
    clock.now += 86400
    begin(tmp_path)
    assert worked(tmp_path) == 20.0
    clock.now += 5
    clock.write(tmp_path / sign)
    clock.now += 50
    begin(tmp_path)
    assert worked(tmp_path) == 25.0


def test_a_start_that_left_nothing_counts_nothing(tmp_path: Path, clock: Clock) -> None:
    begin(tmp_path)
    clock.now += 10
    clock.write(tmp_path / "progress.json")
    for _ in range(3):  # killed before they write again
        clock.now += 100
        begin(tmp_path)
    assert worked(tmp_path) == 10.0
    assert json.loads((tmp_path / "seconds.json").read_text())["started"] == clock.now
