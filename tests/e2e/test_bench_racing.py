"""The benchmark of racing, in small: both searches run through and the row adds up."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.nightly

ROOT = Path(__file__).parents[2]


def test_a_row_has_both_regrets_their_difference_and_what_was_saved() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = ["--domains", "3", "--trials", "12", "--seeds", "2"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "bench_racing.py"), *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    number = r" +([-+]?\d+\.\d+)"
    row = rf"^ +3 +0\.5{number}{number}{number} \+-{number} +(\d+) % +(\d\.\d\d)x$"
    (found,) = re.findall(row, done.stdout, re.M)
    whole, raced, more, _, saved, merges = map(float, found)
    assert more == pytest.approx(raced - whole, abs=0.0011)
    # 5 of 12 candidates, the base and what is verified are on all items, and 3 of 7 race on.
    assert saved == pytest.approx(100 * 4 * 0.75 / 15, abs=3)
    assert merges == pytest.approx(18 / 15, abs=0.05)
