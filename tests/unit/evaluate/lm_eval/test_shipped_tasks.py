"""Tasks that people use, as lm-eval ships them, over documents of ours in the shape of theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from megatron_mergemix.config.evaluate import LmEvalTask
from megatron_mergemix.data.tokenizers import ByteTokenizer
from megatron_mergemix.evaluate.lm_eval import loading
from megatron_mergemix.evaluate.lm_eval.evaluator import LmEvalEvaluator

DOCUMENTS: dict[str, dict[str, Any]] = {
    "gsm8k": {"question": "What is six times seven?", "answer": "6 * 7 = 42\n#### 42"},
    "hellaswag": {
        "ind": 1,
        "activity_label": "Cooking",
        "ctx_a": "A man has a bowl.",
        "ctx_b": "he",
        "ctx": "A man has a bowl. he",
        "endings": ["flies away.", "mixes [step] the dough.", "reads.", "sings."],
        "label": "1",
    },
    "winogrande": {
        "sentence": "The trophy does not fit into the case because the _ is too large.",
        "option1": "trophy",
        "option2": "case",
        "answer": "1",
    },
    "mmlu_anatomy": {
        "question": "Where is the femur?",
        "choices": ["Arm", "Leg", "Head", "Hand"],
        "answer": 1,
        "subject": "anatomy",
    },
}

RIGHT = {
    "gsm8k": ("Question: What is six times seven?\nAnswer:", " 6 * 7 = 42\n#### 42"),
    "hellaswag": ("Cooking: A man has a bowl. He", " mixes the dough."),
    "winogrande": (
        "The trophy does not fit into the case because the trophy",
        " is too large.",
    ),
    "mmlu_anatomy": ("D. Hand\nAnswer:", " B"),
}
"""How the context of the right answer ends, and the answer."""

REQUESTS = {"gsm8k": 1, "hellaswag": 4, "winogrande": 2, "mmlu_anatomy": 4}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_its_documents_are_asked_and_their_right_answers_known(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(loading.lm_eval.tasks.__file__).parent / name.partition("_")[0]
    index = loading.TaskIndex.build([folder])  # all of them take 15 seconds
    monkeypatch.setattr(loading, "_shipped", lambda: index)
    rows = datasets.Dataset.from_list([DOCUMENTS[name]] * 2)
    parts = dict.fromkeys(("train", "dev", "validation", "test"), rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(parts))
    evaluator = LmEvalEvaluator(
        {"own": LmEvalTask(tasks=[name], num_fewshot=0)},
        tokenizer=ByteTokenizer(),
        seq_length=512,
        micro_batch_size=4,
        seed=2,
    )
    first, second = evaluator._search.documents["own"][name]
    assert (first.index, second.index) == (0, 1)
    assert len(first.instances) == REQUESTS[name]
    assert first.gold is not None
    context, answer = first.gold.instance.args
    ending, expected = RIGHT[name]
    assert context.endswith(ending)
    assert answer == expected
