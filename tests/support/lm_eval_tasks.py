"""Local tasks of lm-eval over a few made-up documents, one of every kind."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.support.llama import TEXT

WORDS = [word.strip(".,;?") for word in TEXT.split()]

CHOICE: dict[str, Any] = {
    "task": "own_choice",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}\nAnswer:",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "training_split": "train",
    "fewshot_split": "train",
    "num_fewshot": 2,
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    ],
    "metadata": {"version": 3.0},
}
LETTERS: dict[str, Any] = {
    **CHOICE,
    "task": "own_letters",
    "doc_to_choice": ["A", "B", "C"],
    "num_fewshot": 0,
}
ROLLING: dict[str, Any] = {
    "task": "own_rolling",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "text",
    "metric_list": [
        {"metric": "bits_per_byte"},
        {"metric": "word_perplexity"},
    ],
}
LAST_WORD: dict[str, Any] = {
    "task": "own_last_word",
    "output_type": "loglikelihood",
    "doc_to_text": "start",
    "doc_to_target": "end",
    "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
}
WRITTEN: dict[str, Any] = {
    "task": "own_written",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}\nAnswer:",
    "doc_to_target": "{{choices[gold]}}",
    "generation_kwargs": {"until": ["e", "\n"], "max_gen_toks": 9, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "filter_list": [
        {"name": "first", "filter": [{"function": "take_first"}]},
        {
            "name": "word",
            "filter": [
                {"function": "regex", "regex_pattern": "([a-z]+)"},
                {"function": "take_first"},
            ],
        },
    ],
}
ENDINGS: dict[str, Any] = {
    **CHOICE,
    "task": "own_endings",
    "doc_to_text": "story",
    "doc_to_choice": "endings",
    "doc_to_target": "ending",
    "num_fewshot": 0,
}
"""Whose choices share a context that is much longer than they are."""

ALL = [CHOICE, LETTERS, ROLLING, LAST_WORD, WRITTEN, ENDINGS]


def documents(count: int, seed: int) -> list[dict[str, Any]]:
    """Return made-up documents; some are longer than the model sees at once."""
    draw = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    found = []
    for number in range(count):
        choices = [words(1, 4) for _ in range(3)]
        found.append(
            {
                "question": words(2, 60 if number % 5 == 0 else 12) + ("  " if number % 4 else ""),
                "choices": choices,
                "gold": draw.randrange(3),
                "text": words(3, 40),
                # Without context, with spaces at its end, and plain.
                "start": ["", words(2, 6) + " ", words(2, 6)][number % 3],
                "end": " " + words(1, 2),
            }
        )
    for document in found:  # drawn last, so that what is above is as it was
        document["story"] = words(24, 26)
        document["endings"] = [words(2, 4) for _ in range(4)]
        document["ending"] = draw.randrange(4)
    return found


def write(
    folder: Path, count: int = 12, end: Callable[[str], str | None] | None = None
) -> list[str]:
    """Write data and all tasks; return the names of the tasks' files.

    Args:
        folder: for all of it.
        count: test documents.
        end: what a start shall end with, where it is known.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, size, seed in (("train", 6, 1), ("test", count, 2)):
        found = documents(size, seed)
        for document in found if end is not None else ():
            document["end"] = end(document["start"]) or document["end"]
        lines = [json.dumps(document) for document in found]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return [write_task(folder, task) for task in ALL]


def write_task(folder: Path, task: dict[str, Any]) -> str:
    """Write one task over the data that lie there already."""
    files = {name: f"{name}.jsonl" for name in ("train", "test")}
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
    }
    path = folder / f"{task['task']}.yaml"
    path.write_text(yaml.safe_dump({**shared, **task}, sort_keys=False))
    return str(path)


def write_choices(folder: Path, choices: Sequence[Sequence[str]]) -> Path:
    """Write a task with a question for each of these choices; return its file."""
    lines = [json.dumps({"question": "q", "choices": list(each)}) for each in choices]
    (folder / "own.jsonl").write_text("\n".join(lines) + "\n")
    path = folder / "own.yaml"
    path.write_text(
        "task: own\ndataset_path: json\ntest_split: test\n"
        "dataset_kwargs: {data_files: {test: own.jsonl}}\n"
        'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: choices\n'
        "doc_to_target: 0\nmetric_list: [{metric: acc}]\n"
    )
    return path
