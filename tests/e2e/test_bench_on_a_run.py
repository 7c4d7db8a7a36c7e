"""Benchmarks that search a finished run anew, in small: they end, and their numbers add up."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.experiment import write_experiment
from tests.support.forked_jobs import run_verb

pytestmark = pytest.mark.nightly

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the YAML of an experiment that has its experts."""
    path = write_experiment(tmp_path_factory.mktemp("run"))
    run_verb(path, "train", "base", "experts")
    return path


def printed(tool: str, *words: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / tool), *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_racing_is_compared_on_the_run_s_own_items(trained: Path) -> None:
    words = ["--seeds", "2", "--set", "search.trials=12"]
    text = printed("bench_racing_run.py", str(trained), *words)
    number = r"([-+]?\d+\.\d+)"
    row = (
        rf"^(seed 0|seed 1|  mean): behind the optimum by {number}, raced {number}; racing costs "
        rf"{number} \+- {number}, saves (\d+) % of the items, merges {number} times as often$"
    )
    found = re.findall(row, text, re.M)
    assert [name.strip() for name, *_ in found] == ["seed 0", "seed 1", "mean"]
    for _, whole, raced, costs, _, saved, merges in found:
        assert float(costs) == pytest.approx(float(raced) - float(whole), abs=2e-4)
        assert 0 < int(saved) < 60
        assert float(merges) > 1


def test_forward_passes_of_every_strategy_are_counted(trained: Path) -> None:
    words = ["--seeds", "1", "--strategies", "mergemix", "gradient", "--budgets", "8"]
    text = printed("bench_gradient.py", str(trained), *words)
    (mergemix,) = re.findall(r"^mergemix +8 +(\d+\.\d)", text, re.M)
    (gradient,) = re.findall(r"^gradient +8 +(\d+\.\d)", text, re.M)
    assert 9 <= float(mergemix) <= 12  # the base, the trials, up to three verifications
    assert float(gradient) < 40
    assert "forward passes until every seed reached it:" in text
