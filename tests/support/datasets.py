"""Tiny real datasets: text that differs between domains, written by Megatron's own builder."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from megatron_mergemix.data.documents import Options
from megatron_mergemix.data.prepare import prepare


def make_domains(
    directory: Path,
    names: Sequence[str],
    tokens_each: int | Sequence[int],
    seed: int = 0,
    held_out: float = 0.0,
) -> dict[str, str]:
    """Write one byte-level dataset per domain and return domain -> prefix.

    Every domain has its own 40 words over its own letters, so that a small model learns one
    domain without learning the others. Documents have about 300 tokens.

    Args:
        directory: gets ``<name>.bin``, ``.idx``, ``.json`` and the text ``<name>.jsonl``.
        names: the domains.
        tokens_each: tokens per domain, one number for all or one each; a document more at most.
        seed: the same seed gives the same datasets; a name's text depends on its place too.
        held_out: share of the documents that goes to ``<prefix>_heldout``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    sizes = [tokens_each] * len(names) if isinstance(tokens_each, int) else list(tokens_each)
    prefixes = {}
    for place, (name, size) in enumerate(zip(names, sizes, strict=True)):
        text = directory / f"{name}.jsonl"
        documents = _documents(size, random.Random(f"{seed} {place} {name}"))
        text.write_text("".join(json.dumps({"text": each}) + "\n" for each in documents))
        prefixes[name] = str(directory / name)
        prepare([text], prefixes[name], Options(held_out=held_out))
    return prefixes


def _documents(num_tokens: int, rng: random.Random) -> list[str]:
    letters = rng.sample("abcdefghijklmnopqrstuvwxyz0123456789", 9)
    words = ["".join(rng.choices(letters, k=rng.randint(2, 7))) for _ in range(40)]
    documents = []
    written = 0
    while written < num_tokens:
        text = " ".join(rng.choices(words, k=60)) + ".\n"
        documents.append(text)
        written += len(text) + 1
    return documents
