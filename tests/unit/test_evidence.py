"""What the page of evidence calls a test is one."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "evidence.md").read_text(encoding="utf-8")


def test_everything_that_is_held_names_the_tests_that_hold_it() -> None:
    held = PAGE.split("## Held by tests")[1].split("\n## ")[0].split("\n- ")[1:]
    assert len(held) > 20
    for sentence in held:
        files = re.findall(r"`(\w+/[\w/]*test_\w+\.py)`", sentence)
        assert files, sentence
        for file in files:
            assert (REPOSITORY / "tests" / file).is_file(), file


def test_every_benchmark_that_is_named_is_there() -> None:
    files = re.findall(r"`(tools/\w+\.py)`", PAGE)
    assert files
    for file in files:
        assert (REPOSITORY / file).is_file(), file
