"""The search is as sure as it may be: its own benchmark, in small, on both kinds of items."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.nightly

ROOT = Path(__file__).parents[2]

NUM_SEARCHES = 8


@pytest.mark.parametrize("items", ["own", "shared"])
def test_intervals_hold_the_truth_and_probabilities_come_true(items: str) -> None:
    words = [sys.executable, str(ROOT / "tools" / "bench_uncertainty.py"), "--items", items]
    words += ["--domains", "3", "--trials", "16", "--searches", str(NUM_SEARCHES)]
    words += ["--capabilities", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    row = rf"^ +3 +16 +{NUM_SEARCHES} +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)p"
    found = re.search(row, done.stdout, re.M)
    assert found, done.stdout
    inside, below, above, width = map(float, found.groups())
    assert inside + below + above == pytest.approx(1.0, abs=0.002)
    # Of 8 intervals that hold the truth 95 times in 100, fewer than 6 do in 1 of 173 runs.
    assert inside >= 0.75, done.stdout
    # The surfaces rise by 6 points from the uniform mixture and a trial is known to 1.2.
    assert width < 5.0, done.stdout
    brier = re.search(r"Brier score ([\d.]+)", done.stdout)
    assert brier, done.stdout
    assert float(brier[1]) < 0.1, done.stdout
