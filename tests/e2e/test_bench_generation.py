"""The benchmark of generation compares ways that write the same texts."""

from __future__ import annotations

import re
import sys

import pytest

from tests.support.run_distributed import REPOSITORY, run_command

pytestmark = pytest.mark.nightly


def test_all_ways_write_the_same_texts() -> None:
    words = ["--prompts", "5", "--new", "4", "--hidden", "32", "--layers", "2", "--rounds", "1"]
    done = run_command([sys.executable, str(REPOSITORY / "tools/bench_generation.py"), *words])
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("5 of 5 texts alike") == 3
    ratio = re.search(r"KV cache / whole passes: ([0-9.]+) times", done.stdout)
    assert ratio is not None
    assert float(ratio[1]) > 0
