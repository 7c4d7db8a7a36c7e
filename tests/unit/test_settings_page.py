"""``docs/settings.md`` is what ``tools/settings_page.py`` writes from the settings' models."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def page() -> str:
    text = runpy.run_path(str(REPOSITORY / "tools" / "settings_page.py"))["page"]()
    assert isinstance(text, str)
    return text


def test_the_page_is_up_to_date(page: str) -> None:
    written = (REPOSITORY / "docs" / "settings.md").read_text(encoding="utf-8")
    assert written == page, "write it again: python tools/settings_page.py"


def test_keys_come_with_what_they_take_and_their_default(page: str) -> None:
    assert "## evaluate.capabilities.NAME.lm_eval" in page
    assert (
        "| `limit` | integer |  | Documents per task, drawn by `seed`; default: all. With" in page
    )
    assert "| `kind` | `mean`, `worst` | `mean` |" in page
    assert "| `num_layers` | integer | must be given |" in page
    assert "| `bounds` | two numbers | `[0.0, 1.0]` |" in page


def test_what_the_program_fills_in_is_no_setting(page: str) -> None:
    assert "launched" not in page
    assert "## groups" not in page
