"""The benchmark of lm-eval's tasks, in small: it runs through and prints its ratios."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.nightly

ROOT = Path(__file__).parents[2]


def test_the_benchmark_prints_rates_and_ratios() -> None:
    words = [sys.executable, str(ROOT / "tools" / "bench_eval.py"), "--documents", "60"]
    words += ["--hidden", "32", "--layers", "1", "--rounds", "1", "--vocabulary", "320"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])
    )
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "720 requests" in done.stdout, done.stdout
    for name in ("every choice by itself", "contexts shared"):
        assert re.search(rf"^{name}: \d+ tokens, \d+ with padding$", done.stdout, re.M)
    others = ("every choice by itself", "bare forward passes", "lm-eval, Hugging Face")
    for name in ("evaluator", *others):
        assert re.search(rf"^{name} +\d+ tokens/s +\d+\.\d+ s$", done.stdout, re.M), done.stdout
    for name in others:
        assert re.search(rf"^evaluator's rate / {name}: \d+\.\d\d$", done.stdout, re.M)
