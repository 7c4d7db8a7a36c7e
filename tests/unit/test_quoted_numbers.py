"""What is said elsewhere of the fidelity study is what its page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_mergemix.search import verdict

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "fidelity.md").read_text(encoding="utf-8")


def readme() -> str:
    """Return the part about the study."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    return text.split("## Is the proxy true?")[1].split("\n## ")[0]


def small_share() -> str:
    """Return what a search says of a mixture that all but leaves a domain out."""
    (note,) = verdict._notes_on_small_shares({"math": 0.999, "code": 0.001})
    return note.split("Merges are")[1]


@pytest.mark.parametrize("text", [readme(), small_share()], ids=["README", "verdict"])
def test_every_number_is_on_the_page(text: str) -> None:
    numbers = re.findall(r"\d\.\d{2,}", text)
    assert len(numbers) >= 2
    assert [number for number in numbers if number not in PAGE] == []
