"""What is printed for people is what was said."""

from __future__ import annotations

import pytest
from rich.table import Table

from megatron_mergemix.console import WIDTH, console


def test_brackets_and_colons_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    said = "pip install 'megatron-mergemix[lightgbm]' for [rank1]: :cat:"
    table = Table(said, title=said)
    table.add_row(said)
    console().print(said)
    console().print(table)
    assert capsys.readouterr().out.count(said) == 4


def test_a_log_is_wide(capsys: pytest.CaptureFixture[str]) -> None:
    console().print("x" * WIDTH)
    assert capsys.readouterr().out == "x" * WIDTH + "\n"
