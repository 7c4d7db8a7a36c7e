"""What a failing rank leaves for the launching side."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_mergemix.errors import CheckpointError
from megatron_mergemix.processes import error_file
from megatron_mergemix.processes.error_file import leave_error


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the waits of this rank, which take no time."""
    waits: list[float] = []
    monkeypatch.setattr(error_file.time, "sleep", waits.append)
    monkeypatch.setenv("RANK", "2")
    return waits


def leave(path: Path, error: Exception) -> str:
    try:
        raise error
    except Exception as raised:
        leave_error(str(path), raised)
    return path.read_text()


def test_our_own_error_is_left_as_it_is(tmp_path: Path, slept: list[float]) -> None:
    assert leave(tmp_path / "search.error", CheckpointError("math is cut off.")) == (
        "math is cut off."
    )
    assert slept == []


def test_a_foreign_error_names_rank_and_log(tmp_path: Path, slept: list[float]) -> None:
    (tmp_path / "search.log").touch()
    text = leave(tmp_path / "search.error", ValueError("odd shape"))
    assert text == (
        f"rank 2: ValueError: odd shape\nThe traceback is in {tmp_path / 'search.log'}. What is "
        "finished is kept: mend the cause and start it again."
    )
    assert slept == []


def test_the_first_rank_to_fail_wins(tmp_path: Path, slept: list[float]) -> None:
    path = tmp_path / "search.error"
    leave(path, CheckpointError("the cause"))
    assert leave(path, CheckpointError("a consequence")) == "the cause"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error"),
        dist.DistBackendError("NCCL error: remote process exited"),
        dist.DistNetworkError("Connection reset by peer"),
    ],
)
def test_a_rank_that_lost_another_waits_for_the_cause(
    tmp_path: Path, slept: list[float], error: Exception
) -> None:
    """Else its message would hide that the other one was killed."""
    leave(tmp_path / "search.error", error)
    assert slept == [error_file._SECONDS_FOR_THE_CAUSE]
