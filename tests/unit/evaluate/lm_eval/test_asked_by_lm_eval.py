"""lm-eval's own loop asks the model by its own methods, and gets the numbers of the search."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import lm_eval.evaluator
import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from megatron_mergemix.config.evaluate import LmEvalTask
from megatron_mergemix.data.tokenizers import ByteTokenizer
from megatron_mergemix.evaluate.lm_eval.language_model import ResidentLM
from megatron_mergemix.evaluate.lm_eval.loading import load_tasks

from .conftest import Make
from .test_evaluator import EVERY, Candidate


def answer(instance: Instance) -> Any:
    """An answer that only what is asked decides upon."""
    texts = instance.args[:2] if instance.request_type == "loglikelihood" else instance.args[:1]
    value = zlib.crc32(repr(texts).encode())
    share = value / 2**32
    if instance.request_type == "generate_until":
        return ["cat", "The moon", "five"][value % 3]
    if instance.request_type == "loglikelihood_rolling":
        return -50 * share
    return (-5 * share, share < 0.3)


def test_lm_evals_own_loop_gets_the_numbers_of_the_search(
    make: Make, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def answers(self: ResidentLM, given: Any, proxy: Any) -> list[Any]:
        asked.extend(instance.request_type for instance in given.instances)
        return [answer(instance) for instance in given.instances]

    monkeypatch.setattr(ResidentLM, "answers", answers)
    # Asks pip and compilers for their versions.
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda *_: None)
    proxy: Any = object()
    ours = make(*EVERY).evaluate(proxy)["own"]
    asked.clear()
    files = [str(folder / f"{name}.yaml") for name in EVERY]
    found = lm_eval.evaluator.simple_evaluate(
        model=ResidentLM(ByteTokenizer(), max_length=512, micro_batch_size=4, proxy=proxy),
        tasks=list(load_tasks(LmEvalTask(tasks=files)).values()),
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    assert found is not None
    assert set(asked) == {"loglikelihood", "loglikelihood_rolling", "generate_until"}
    compared = 0
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, _, which = key.partition(",")
            if which and not metric.endswith("_stderr"):
                name = metric if which == "none" else key
                assert ours[f"{task}/{name}"].value == pytest.approx(value, rel=1e-6), key
                compared += 1
    assert compared == 10


def test_text_becomes_tokens_once_for_all_candidates(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = make(*EVERY, first_share=0.5)

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("text is tokenized again")

    monkeypatch.setattr(ResidentLM, "tok_encode", refused)
    first, second = (evaluator.evaluate(Candidate(seed)) for seed in (1, 2))
    assert first != second
    begun = evaluator.evaluate_first(Candidate(1))
    assert evaluator.evaluate_others(Candidate(1), begun)["own"].keys() == first["own"].keys()
