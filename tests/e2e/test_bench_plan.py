"""The check of the cost model, in small: it measures, fits one size, and predicts the other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.nightly

ROOT = Path(__file__).parents[2]


def test_the_benchmark_prints_predicted_and_measured_seconds_and_their_difference(
    tmp_path: Path,
) -> None:
    words = [sys.executable, str(ROOT / "tools" / "bench_plan.py"), "--folder", str(tmp_path)]
    words += ["--sizes", "tiny", "1M", "--fit", "1M", "--rounds", "1", "--cpu-clock"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^1 threads, medians of 1 rounds, processor seconds, load", done.stdout, re.M)
    machine = r"^this machine: \d+\.\d GFLOP/s in .*, copy_ \d+\.\d GB/s, softmax \d+\.\d GB/s$"
    assert re.search(machine, done.stdout, re.M), done.stdout
    row = r"^ *(tiny|1M) +[\d,]+ +[\d,]+  (\w+) +(\d+\.\d+) +(\d+\.\d+) +([+-]\d+\.\d)%(  fitted)?$"
    rows = re.findall(row, done.stdout, re.M)
    parts = ("merge", "evaluate", "candidate")
    assert [found[:2] for found in rows] == [(s, p) for s in ("tiny", "1M") for p in parts]
    for size, part, predicted, measured, error, fitted in rows:
        assert bool(fitted) == (size == "1M")
        if fitted:
            assert abs(float(error)) < 0.1
        elif part != "merge":  # a tiny merge is less than the digits that are printed
            expected = 100 * (float(predicted) / float(measured) - 1)
            assert abs(float(error) - expected) < 3
