"""The benchmark of hierarchies, in small: every way to search runs through on the same surfaces."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.nightly

ROOT = Path(__file__).parents[2]
PARTS = ("", ", composed", ", coarse")


def test_every_search_has_its_mean_and_worst_regret() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = ["--groups", "2,1", "--trials", "8", "--group-trials", "8", "--items", "3000"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "bench_hierarchy.py"), *words, "--seeds", "2"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^ +3000  (.+?) +(-?\d+\.\d+) +(-?\d+\.\d+)$", done.stdout, re.M)
    levels = [f"{order}{part}" for order in ("top_down", "bottom_up") for part in PARTS]
    assert [name for name, *_ in rows] == ["uniform mixture", "all at once", *levels]
    for _, mean, worst in rows:
        assert -0.001 <= float(mean) <= float(worst)
