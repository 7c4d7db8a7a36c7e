"""The corpus of the quickstart: always the same, true, and fit for a held-out split."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mergemix.data.documents import Options
from megatron_mergemix.data.indexed import IndexedDataset
from megatron_mergemix.data.prepare import prepare

pytestmark = pytest.mark.nightly

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart" / "make_corpus.py"
DOMAINS = ("code", "prose", "science", "math")
WINDOWS, WINDOW_TOKENS = 64, 128
"""What examples/quickstart/mix.yaml evaluates per domain."""


def make(folder: Path) -> dict[str, list[str]]:
    subprocess.run([sys.executable, SCRIPT, folder], check=True, capture_output=True)
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{d}.jsonl" for d in DOMAINS)
    return {
        name: [json.loads(line)["text"] for line in (folder / f"{name}.jsonl").open()]
        for name in DOMAINS
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return make(tmp_path_factory.mktemp("corpus") / "new")


def test_a_second_run_gives_the_same_texts(corpus: dict[str, list[str]], tmp_path: Path) -> None:
    assert make(tmp_path) == corpus


def test_documents_are_distinct_and_of_moderate_length(corpus: dict[str, list[str]]) -> None:
    for name, texts in corpus.items():
        lengths = sorted(map(len, texts))
        assert len(set(texts)) == len(texts) >= 100, name
        assert lengths[-1] <= 9000, name
        assert 1000 <= lengths[len(lengths) // 2] <= 8000, name


def test_domains_have_unequal_sizes_of_a_few_megabytes(corpus: dict[str, list[str]]) -> None:
    sizes = {name: sum(len(text.encode()) for text in texts) for name, texts in corpus.items()}
    assert sizes["code"] > sizes["science"] > sizes["math"] > sizes["prose"] > 250_000
    assert sizes["code"] < 4_500_000


def test_no_long_paragraph_of_the_prose_is_repeated(corpus: dict[str, list[str]]) -> None:
    paragraphs = [part for text in corpus["prose"] for part in text.split("\n\n") if len(part) > 99]
    assert len(set(paragraphs)) == len(paragraphs)


def test_every_step_of_the_arithmetic_is_true(corpus: dict[str, list[str]]) -> None:
    checked = 0
    for problem in "\n".join(corpus["math"]).split("Problem: ")[1:]:
        answer = re.search(r"^Answer: (\d+)", problem, re.M)
        assert answer
        for line in problem.splitlines():
            # The last colon separates words from the equation.
            sides = line.rpartition(": ")[2].split(" = ")
            if len(sides) > 1:
                values = {eval(side, {"x": int(answer[1])}) for side in sides}
                assert len(values) == 1, line
                checked += 1
    assert checked > 15_000


@pytest.mark.parametrize("name", DOMAINS)
def test_the_share_that_the_quickstart_holds_out_fills_its_windows(
    corpus: dict[str, list[str]], tmp_path: Path, name: str
) -> None:
    share = re.search(r"--held-out ([0-9.]+)", (SCRIPT.parent / "run.sh").read_text())
    assert share
    source = tmp_path / f"{name}.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus[name]))
    prepare([source], tmp_path / name, Options(held_out=float(share[1])))
    held_out = IndexedDataset(str(tmp_path / f"{name}_heldout"))
    assert held_out.num_tokens > WINDOWS * WINDOW_TOKENS
