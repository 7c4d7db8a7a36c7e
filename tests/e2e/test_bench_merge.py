"""The benchmark of merging, in small: it runs through and prints every figure and every target."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.nightly

ROOT = Path(__file__).parents[2]
NUMBER = r" +\d+\.\d+"


def test_the_benchmark_prints_bounds_figures_and_targets(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "tools" / "bench_merge.py"), "--folder", str(tmp_path)]
    words += ["--size", "2e6", "--repeats", "1", "--moments", "--grow"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    bounds = ["cat 3, cp 1", "cat 3, dd 1", "cat 3, cp 1, fsync", "cat 3, dd 1, fsync"]
    bounds += ["memcpy of 0.27 GB, one core", "CRC-32 of 0.27 GB, one core"]
    for label in bounds:
        assert re.search(rf"^{re.escape(label)}{NUMBER * 2} +{NUMBER}$", done.stdout, re.M), label
    ours = ["", " --no-verify", " --no-verify, no fsync", " --workers 2"]
    ours += [", optimizer state beside", ", four times as large"]
    for label in ours:
        # Whole and net, minimum and median of each; bytes per second; memory.
        row = rf"^mergemix merge{re.escape(label)}{NUMBER * 6}$"
        assert re.search(row, done.stdout, re.M), label + done.stdout
    targets = ["share of the bound, net of start-up: default", "start-up"]
    targets += ["anonymous memory: mergemix merge", "memory of a model four times as large"]
    targets += ["time with optimizer state beside the weights"]
    for label in targets:
        row = rf"^{re.escape(label)}{NUMBER}.*(met|MISSED)$"
        assert re.search(row, done.stdout, re.M), label + done.stdout
