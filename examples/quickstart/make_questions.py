"""Write multiple-choice questions about held-out text: which of four passages goes on here?

    python examples/quickstart/make_questions.py DATA

For every domain DATA/<domain>_heldout (.bin, .idx) gives DATA/<domain>_cloze.jsonl, which the tasks
in examples/quickstart/tasks read. One wrong passage is of the same domain and two are of others, so
that a model as small as that of the quickstart does better than chance. The same data gives the
same questions.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_mergemix.data.indexed import IndexedDataset
from megatron_mergemix.data.tokenizers import ByteTokenizer
from megatron_mergemix.files.publishing import publish_text

DOMAINS = ("code", "prose", "science", "math")
QUESTIONS = 100
CONTEXT, PASSAGE = 56, 16
"""Characters that are shown, and of every choice."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of the quickstart's datasets")
    data = parser.parse_args().data
    texts = {domain: documents(data / f"{domain}_heldout") for domain in DOMAINS}
    for domain in DOMAINS:
        lines = [json.dumps(each) for each in questions(domain, texts, random.Random(domain))]
        publish_text(data / f"{domain}_cloze.jsonl", "\n".join(lines) + "\n")


def documents(prefix: Path) -> list[str]:
    """Return the texts of a dataset that hold a question."""
    tokens, tokenizer = IndexedDataset(str(prefix)).tokens, ByteTokenizer()
    parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.eod))
    texts = map(tokenizer.decode, parts)
    return [text for text in texts if len(text) > 2 * (CONTEXT + PASSAGE)]


def questions(
    domain: str, texts: dict[str, list[str]], rng: random.Random
) -> Iterator[dict[str, object]]:
    """Yield context, choices and the number of the right one."""
    asked: set[str] = set()
    while len(asked) < QUESTIONS:
        others = rng.sample([name for name in DOMAINS if name != domain], 2)
        found = [passage(rng.choice(texts[name]), rng) for name in (domain, domain, *others)]
        (context, answer), choices = found[0], [text for _, text in found]
        if context not in asked and len(set(choices)) == len(choices):
            asked.add(context)
            rng.shuffle(choices)
            yield {"context": context, "choices": choices, "gold": choices.index(answer)}


def passage(text: str, rng: random.Random) -> tuple[str, str]:
    """Return what stands before a word, and the passage that begins with it."""
    while True:
        start = text.find(" ", rng.randrange(CONTEXT, len(text) - PASSAGE)) + 1
        # lm-eval joins context and choice by the space between them.
        context, found = text[start - CONTEXT : start - 1], text[start : start + PASSAGE]
        is_whole = start >= CONTEXT and len(found) == PASSAGE
        if is_whole and not context[-1].isspace() and found == found.strip():
            return context, found


if __name__ == "__main__":
    main()
