"""What a rank reads, and that nothing outlives it."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mergemix.config import Config, load_config
from megatron_mergemix.files.publishing import publish_json
from megatron_mergemix.jobs import worker
from tests.support.run_distributed import REPOSITORY
from tests.support.untrained import write_config

IN_THE_HELPER = """
import ctypes, runpy
runpy.run_module("megatron_mergemix.jobs.worker", run_name="__mp_main__")
number = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(number))  # PR_GET_PDEATHSIG
print(number.value)
"""


def test_a_spawned_helper_of_a_rank_dies_with_it() -> None:
    """Megatron's checkpoint writer spawns one, which would serve a queue to nobody for ever."""
    told = {"_MERGEMIX_PARENT": str(os.getpid())}  # as a rank tells what it spawns
    environment = os.environ | told | {"PYTHONPATH": str(REPOSITORY)}
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
