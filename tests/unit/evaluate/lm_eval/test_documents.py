"""Which documents a task has, what its digest sees of them, and which right answers they have."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from megatron_mergemix.config.evaluate import LmEvalTask
from megatron_mergemix.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer
from megatron_mergemix.evaluate.lm_eval.evaluator import LmEvalEvaluator
from tests.support.replay import Replay

SHUFFLED = """
import random

def process_docs(dataset):
    def shuffled(document):
        return {"choices": random.sample(document["choices"], 4)}
    return dataset.map(shuffled)
"""


def write(folder: Path, name: str, task: str, documents: Sequence[Mapping[str, Any]]) -> Path:
    """Write a task file over documents of its own."""
    lines = [json.dumps(document) for document in documents]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    head = (
        f"task: {name}\ndataset_path: json\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}\n"
    )
    path = folder / f"{name}.yaml"
    path.write_text(head + task)
    return path


def built(*files: Path) -> LmEvalEvaluator:
    return LmEvalEvaluator(
        {"own": LmEvalTask(tasks=[str(file) for file in files])},
        tokenizer=ByteTokenizer(),
        seq_length=64,
        micro_batch_size=2,
    )


def choices(evaluator: LmEvalEvaluator, task: str) -> list[str]:
    documents = evaluator._search.documents["own"][task]
    return [instance.args[1] for each in documents for instance in each.instances]


@pytest.mark.parametrize("grouped", [False, True])
def test_what_a_task_shuffles_does_not_depend_on_which_others_are_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grouped: bool
) -> None:
    (tmp_path / "utils.py").write_text(SHUFFLED)
    task = (
        "output_type: multiple_choice\nprocess_docs: !function utils.process_docs\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: choices\ndoc_to_target: 0\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    first, second = (
        write(
            tmp_path,
            name,
            task,
            [{"question": f"{name} {n}", "choices": list("abcd")} for n in range(8)],
        )
        for name in ("first", "second")
    )
    both, alone = [first, second], [first]
    if grouped:
        both, alone = [write_group(both)], [write_group(alone)]
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "empty")
    expected = built(*both)
    names = list(expected._search.documents["own"])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    built(*alone)
    found = built(*both)
    for name in names:
        assert choices(found, name) == choices(expected, name)
        assert len(set(choices(found, name)[::4])) > 1, "they are shuffled"
    assert choices(found, names[0]) != choices(found, names[1])
    assert found.digest() == expected.digest()


def write_group(files: Sequence[Path]) -> Path:
    """Write a group with the tasks written out in it."""
    lines = ["group: both", "task:"]
    for file in files:
        lines += ["  - " + "\n    ".join(file.read_text().splitlines())]
    path = files[0].parent / f"of_{len(files)}.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


GENERATED = """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "yes"
generation_kwargs: {until: ["."], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""

SCORED = """
def is_right(answer, key):
    return answer.strip() == key

def score(document, results):
    return {"acc": float(is_right(results[0], document["key"]))}
"""

CLASS = """
from lm_eval.api.task import ConfigurableTask

class Strange:
    pass

def is_right(answer, key):
    return answer.strip() == key

class Own(ConfigurableTask):
    is_built = False

    def __init__(self, config):
        super().__init__(config={name: config[name] for name in config if name != "class"})
        self.is_built = True

    def test_docs(self):
        strange = {"object": Strange(), "nested": {("a", "b"): 1}}
        found = super().test_docs()
        return [{**each, **strange} for each in found] if self.is_built else found

    def process_results(self, document, results):
        return {"acc": float(is_right(results[0], document["key"]))}
"""


@pytest.mark.parametrize(
    ("code", "line"),
    [(SCORED, "process_results: !function utils.score\n"), (CLASS, "class: !function utils.Own\n")],
)
def test_the_digest_changes_with_every_right_answer_and_with_all_code_beside_what_scores(
    tmp_path: Path, code: str, line: str
) -> None:
    def digest(key: str, code: str) -> str:
        write(tmp_path, "own", GENERATED + line, [{"question": "q", "key": key}] * 3)
        (tmp_path / "utils.py").write_text(code)
        return str(built(tmp_path / "own.yaml").digest())

    plain = digest("yes", code)
    assert digest("yes", code) == plain
    other_answers = digest("no", code)
    other_helper = digest("yes", code.replace("== key", "!= key"))
    assert len({plain, other_answers, other_helper}) == 3


@pytest.mark.parametrize(
    ("target", "more", "gold"),
    [
        ("answer", "", " 7"),
        ('"{{answer}}"', "", " 7"),
        ("0", "doc_to_choice: [seven, eight]\n", " seven"),
        ("answers", "", " seven"),
        ("0", "", None),
        ("spans", "", None),
        ("nothing", "", None),
    ],
)
def test_a_stand_in_for_a_right_answer_is_none(
    tmp_path: Path, target: str, more: str, gold: str | None
) -> None:
    document = {
        "question": "q",
        "answer": 7,
        "answers": ["seven", "7"],
        "spans": {"text": ["seven"], "start": [3]},
        "nothing": None,
    }
    task = GENERATED.replace('doc_to_target: "yes"', f"doc_to_target: {target}") + more
    evaluator = built(write(tmp_path, "own", task, [document] * 2))
    for each in evaluator._search.documents["own"]["own"]:
        assert (None if each.gold is None else each.gold.instance.args[1]) == gold
    assert ("gold_bpb" in evaluator._work["own"]["own"].metrics) == (gold is not None)


@pytest.mark.parametrize(("prefix", "turn"), [("It is", "It is yes"), (None, "yes")])
def test_a_right_answer_goes_on_where_the_template_or_the_prefix_of_answers_ends(
    tmp_path: Path, hugging_face: HuggingFaceTokenizer, prefix: str | None, turn: str
) -> None:
    more = "" if prefix is None else f"gen_prefix: {prefix}\n"
    path = write(tmp_path, "own", GENERATED + more, [{"question": "Is it?"}] * 2)
    evaluator = LmEvalEvaluator(
        {"own": LmEvalTask(tasks=[str(path)], chat_template=True)},
        tokenizer=hugging_face,
        seq_length=64,
        micro_batch_size=2,
    )
    gold = evaluator._search.documents["own"]["own"][0].gold
    assert gold is not None
    context, answer = gold.instance.args
    whole = context + answer
    assert whole.endswith(turn)
    assert prefix is not None or not answer.startswith(" ")


SOME_GOLD = GENERATED.replace('doc_to_target: "yes"', "doc_to_target: key")


def test_the_bits_of_right_answers_need_no_text_written_and_no_document_without_one(
    tmp_path: Path,
) -> None:
    keys = ["yes", "", "no", "", "", "perhaps", "", ""]
    task = SOME_GOLD.replace("do_sample: false", "do_sample: true, temperature: 0.7")
    path = write(
        tmp_path, "own", task, [{"question": f"q{n}", "key": k} for n, k in enumerate(keys)]
    )
    evaluator = LmEvalEvaluator(
        {"own": LmEvalTask(tasks=[str(path)], metric="gold_bpb")},
        tokenizer=ByteTokenizer(),
        seq_length=64,
        micro_batch_size=2,
        first_share=0.3,
    )
    assert evaluator.kept_tokens == 0
    assert sorted(each.index for each in evaluator._search.documents["own"]["own"]) == [0, 2, 5]
    first = evaluator.evaluate_first(Replay([-1.0, -1.5], [False, False]))
    whole = evaluator.evaluate_others(Replay([-2.0], [False]), first)
    assert set(first["own"]) == set(whole["own"]) == {"own/gold_bpb"}
    assert whole["own"]["own/gold_bpb"].num_samples == 3
