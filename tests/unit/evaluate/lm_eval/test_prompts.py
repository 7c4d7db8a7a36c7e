"""Questions are put as lm-eval itself puts them, and nobody is asked for them but the files."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest

from megatron_mergemix.config.evaluate import LmEvalTask
from megatron_mergemix.data.tokenizers import HuggingFaceTokenizer
from megatron_mergemix.evaluate.lm_eval.evaluator import LmEvalEvaluator
from tests.support import llama, lm_eval_tasks

TASKS = ["own_choice", "own_letters", "own_last_word", "own_written"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    llama.write_tokenizer(folder / "tokenizer", chat_begins=True)
    lm_eval_tasks.write(folder / "tasks")
    return folder


@pytest.fixture(scope="module")
def theirs(home: Path) -> Any:
    """Return what lm-eval asks of its own Hugging Face backend, as a function of its settings."""
    import lm_eval.evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    patch = pytest.MonkeyPatch()
    patch.setattr(lm_eval.evaluator, "add_env_info", lambda *_: None)  # asks pip and compilers
    patch.chdir(home / "tasks")  # where lm-eval looks for the tasks' data
    backend = HFLM(
        pretrained=llama.hugging_face(),
        tokenizer=AutoTokenizer.from_pretrained(home / "tokenizer"),
        batch_size=8,
    )
    manager = TaskManager(include_path=str(home / "tasks"), include_defaults=False)

    def ask(**settings: Any) -> dict[str, dict[int, list[tuple[Any, ...]]]]:
        found: Any = lm_eval.evaluator.simple_evaluate(
            model=backend, tasks=TASKS, task_manager=manager, bootstrap_iters=0, **settings
        )
        return {
            task: {row["doc_id"]: [tuple(each) for each in row["arguments"]] for row in rows}
            for task, rows in found["samples"].items()
        }

    yield ask
    patch.undo()


@pytest.mark.parametrize(
    ("ours", "their"),
    [
        ({}, {}),
        ({"num_fewshot": 0}, {"num_fewshot": 0}),
        ({"num_fewshot": 3}, {"num_fewshot": 3}),
        ({"num_fewshot": 2, "seed": 7}, {"num_fewshot": 2, "fewshot_random_seed": 7}),
        ({"system_instruction": "Be brief."}, {"system_instruction": "Be brief."}),
        (
            {"chat_template": True, "num_fewshot": 2, "system_instruction": "Be brief."},
            {
                "apply_chat_template": True,
                "fewshot_as_multiturn": True,
                "num_fewshot": 2,
                "system_instruction": "Be brief.",
            },
        ),
    ],
    ids=["as the task says", "none", "three", "another seed", "instruction", "conversation"],
)
def test_every_prompt_is_that_of_lm_eval_s_own_command(
    home: Path, theirs: Any, ours: dict[str, Any], their: dict[str, Any]
) -> None:
    expected = theirs(**their)
    evaluator = LmEvalEvaluator(
        {"own": LmEvalTask(tasks=TASKS, include_path=[home / "tasks"], **ours)},
        tokenizer=HuggingFaceTokenizer(home / "tokenizer"),
        seq_length=llama.LENGTH,
        micro_batch_size=4,
    )
    found = {
        task: {each.index: [instance.args for instance in each.instances] for each in documents}
        for task, documents in evaluator._search.documents["own"].items()
    }
    assert found == expected
    assert {len(documents) for documents in found.values()} == {12}
    begins = {args[0] for asked in found["own_choice"].values() for args in asked}
    assert {begin.count("Answer:") for begin in begins} == {1 + ours.get("num_fewshot", 2)}
    assert all(("Be brief." in begin) == ("system_instruction" in ours) for begin in begins)


def test_local_tasks_and_tokenizers_are_read_without_any_network(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def refuse(*args: Any, **_: Any) -> NoReturn:
        asked.append(args)
        raise OSError("there is no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    files = [str(home / "tasks" / f"{name}.yaml") for name in TASKS]
    evaluator = LmEvalEvaluator(
        {"own": LmEvalTask(tasks=files)},
        tokenizer=HuggingFaceTokenizer(home / "tokenizer"),
        seq_length=llama.LENGTH,
        micro_batch_size=4,
    )
    assert {len(found) for found in evaluator._search.documents["own"].values()} == {12}
    assert evaluator.digest()
    assert asked == []
