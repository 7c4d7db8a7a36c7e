"""The benchmark of the resident merge, in small: it runs through and prints every rate."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.nightly

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("place", ["device", "file"])
def test_the_benchmark_prints_the_ratio_to_a_copy_for_every_dtype(place: str) -> None:
    words = [sys.executable, str(ROOT / "tools" / "bench_resident.py"), "--device", "cpu"]
    words += ["--gigabytes", "0.01", "--experts", "3", "9", "--rounds", "2", "--place", place]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"2 threads, copies in: {place}" in done.stdout
    for dtype in ("float32", "bfloat16"):
        for num in (3, 9):
            row = rf"^{dtype} +{num} +(\d+\.\d) +(\d+\.\d) +(\d+\.\d\d)  \d+\.\d ms$"
            found = re.search(row, done.stdout, re.M)
            assert found, done.stdout
            merged, copied, ratio = map(float, found.groups())
            # The rates are printed with one decimal, the ratio is that of the whole numbers.
            assert (merged - 0.05) / (copied + 0.05) - 0.005 <= ratio
            assert ratio <= (merged + 0.05) / (copied - 0.05) + 0.005
