"""The questions of the quickstart: about held-out text, answerable by it, and always the same."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_mergemix.data.documents import Options
from megatron_mergemix.data.prepare import prepare

pytestmark = pytest.mark.nightly

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart" / "make_questions.py"
DOMAINS = ("code", "prose", "science", "math")
CONTEXT, PASSAGE, QUESTIONS = 56, 16, 100


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Return made-up documents; every word tells its domain."""
    draw = random.Random(3)
    return {
        domain: [
            " ".join(f"{domain[:3]}{draw.randrange(10_000)}" for _ in range(80)) for _ in range(12)
        ]
        for domain in DOMAINS
    }


@pytest.fixture(scope="module")
def data(texts: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for domain, documents in texts.items():
        lines = [json.dumps({"text": text}) for text in documents]
        (folder / f"{domain}.jsonl").write_text("\n".join(lines) + "\n")
        prepare([folder / f"{domain}.jsonl"], folder / f"{domain}_heldout", Options())
    return folder


def asked(data: Path) -> dict[str, list[dict[str, Any]]]:
    subprocess.run([sys.executable, SCRIPT, data], check=True)
    return {
        domain: [json.loads(line) for line in (data / f"{domain}_cloze.jsonl").open()]
        for domain in DOMAINS
    }


def test_the_right_passage_goes_on_in_the_held_out_text(
    data: Path, texts: dict[str, list[str]]
) -> None:
    for domain, questions in asked(data).items():
        assert len(questions) == QUESTIONS
        assert len({question["context"] for question in questions}) == QUESTIONS
        for question in questions:
            assert len(question["context"]) == CONTEXT - 1
            answer = question["choices"][question["gold"]]
            assert any(f"{question['context']} {answer}" in text for text in texts[domain])


def test_one_wrong_passage_is_of_the_same_domain_and_two_are_of_others(
    data: Path, texts: dict[str, list[str]]
) -> None:
    for domain, questions in asked(data).items():
        for question in questions:
            choices = question["choices"]
            assert len(set(choices)) == 4
            assert {len(choice) for choice in choices} == {PASSAGE}
            own = [choice for choice in choices if any(choice in text for text in texts[domain])]
            assert len(own) == 2
            right = choices[question["gold"]]
            for choice in set(choices) - {right}:
                assert not any(f"{question['context']} {choice}" in t for t in texts[domain])


def test_the_right_one_stands_in_every_place_and_a_second_run_asks_the_same(data: Path) -> None:
    first = asked(data)
    assert asked(data) == first
    for questions in first.values():
        assert {question["gold"] for question in questions} == {0, 1, 2, 3}
