"""Launches that tests make of a module: ranks, output, exit code, and that nobody is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.forked_launch import run_forked
from tests.support.megatron_lm import each_checkout
from tests.support.processes import is_dead
from tests.support.run_distributed import RankFailure

pytestmark = pytest.mark.nightly

SUM = """
import os, sys
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([dist.get_rank() + 1])
dist.all_reduce(total)
print("rank", dist.get_rank(), "of", sys.argv[1], os.environ["OWN"], "has", total.item())
dist.destroy_process_group()
"""

FAILS = """
import os, time
print("rank", os.environ["RANK"], flush=True)
if os.environ["RANK"] == "1":
    raise ValueError("the reason")
time.sleep(100)
"""

HANGS = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
print("so far", flush=True)
time.sleep(100)
"""


KNOWS_MEGATRON = """
import os, sys
print("rank", sys.modules["megatron.training"].__file__, os.environ["CUDA_DEVICE_MAX_CONNECTIONS"])
import torch
print("rank", torch.empty(1, device="cuda").device)
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # where ``python -m`` looks first
    return lambda name, code: Path(f"{name}.py").write_text(code)


def test_ranks_find_each_other_their_arguments_and_their_environment(write) -> None:
    write("adding", SUM)
    done = run_forked("adding", 2, ["two"], {"OWN": "mine"})
    assert done.returncode == 0, done.stdout
    said = [line for line in done.stdout.splitlines() if line.startswith("rank ")]  # torch warns
    assert sorted(said) == [
        "rank 0 of two mine has 3",
        "rank 1 of two mine has 3",
    ]


def test_a_launch_knows_nothing_of_those_before_it(write) -> None:
    write("adding", SUM)
    assert run_forked("adding", 1, ["one"], {"OWN": "first"}).returncode == 0
    done = run_forked("adding", 1, ["one"])
    assert done.returncode == 1
    assert "KeyError: 'OWN'" in done.stdout


@each_checkout()
def test_a_checkout_is_imported_in_cpu_mode_before_the_module(checkout: Path, write) -> None:
    write("knowing", KNOWS_MEGATRON)
    done = run_forked("knowing", 1, checkout=checkout)
    assert done.returncode == 0, done.stdout
    said = [line for line in done.stdout.splitlines() if line.startswith("rank ")]
    file = checkout / "megatron" / "training" / "__init__.py"
    assert said == [f"rank {file} 1", "rank cpu"]


def test_a_rank_that_fails_ends_the_others(write) -> None:
    write("failing", FAILS)
    done = run_forked("failing", 2, timeout=30)
    assert done.returncode == 1
    assert "rank 0" in done.stdout
    assert "ValueError: the reason" in done.stdout


def test_a_timeout_kills_the_ranks_and_their_children(write, tmp_path: Path) -> None:
    write("hanging", HANGS)
    with pytest.raises(RankFailure, match="(?s)No end after 8.*so far"):
        run_forked("hanging", 1, [str(tmp_path / "child")], timeout=8)
    assert is_dead(int((tmp_path / "child").read_text()))
