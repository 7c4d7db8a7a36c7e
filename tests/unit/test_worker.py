"""What a failing rank leaves for the launching side."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_mergemix import worker
from megatron_mergemix.config import Config, load_config
from megatron_mergemix.errors import CheckpointError
from megatron_mergemix.run_dir import publish_json
from tests.support.run_distributed import REPOSITORY
from tests.support.untrained import write_config


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the waits of this rank, which take no time."""
    waits: list[float] = []
    monkeypatch.setattr(worker.time, "sleep", waits.append)
    monkeypatch.setenv("RANK", "2")
    return waits


def leave(path: Path, error: Exception) -> str:
    try:
        raise error
    except Exception as raised:
        worker.leave_error(str(path), raised)
    return path.read_text()


def test_our_own_error_is_left_as_it_is(tmp_path: Path, slept: list[float]) -> None:
    assert leave(tmp_path / "search.error", CheckpointError("math is cut off.")) == (
        "math is cut off."
    )
    assert slept == []


def test_a_foreign_error_names_rank_and_log(
    tmp_path: Path, slept: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    text = leave(tmp_path / "search.error", ValueError("odd shape"))
    assert text == (
        f"rank 2: ValueError: odd shape\nThe traceback is in {tmp_path / 'search.log'}. What is "
        "finished is kept: mend the cause and start it again."
    )
    assert slept == []
    assert "Traceback" in capsys.readouterr().err


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
    assert slept == [worker._SECONDS_FOR_THE_CAUSE]


IN_THE_HELPER = """
import ctypes, runpy
runpy.run_module("megatron_mergemix.worker", run_name="__mp_main__")
number = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(number))  # PR_GET_PDEATHSIG
print(number.value)
"""


def test_a_spawned_helper_of_a_rank_dies_with_it() -> None:
    """Megatron's checkpoint writer spawns one, which would serve a queue to nobody for ever."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", IN_THE_HELPER], capture_output=True, text=True, env=environment
    )
    assert done.stdout == f"{int(signal.SIGKILL)}\n", done.stderr


def test_a_rank_takes_the_settings_on_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_mergemix.jobs import train
    from megatron_mergemix.megatron import parallel

    path = write_config(tmp_path)
    config = load_config(path, ["experts.lr=0.5"])
    publish_json(tmp_path / "config.json", config.model_dump(mode="json"))
    path.write_text("edited meanwhile")
    jobs: list[tuple[Config, list[str]]] = []
    monkeypatch.setattr(parallel, "start", lambda layout: None)
    monkeypatch.setattr(train, "train_all", lambda config, names: jobs.append((config, names)))
    worker.run(
        argparse.Namespace(job="train", config=str(tmp_path / "config.json"), names=["base"])
    )
    assert jobs == [(config, ["base"])]
