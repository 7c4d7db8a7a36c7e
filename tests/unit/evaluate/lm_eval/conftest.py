"""Local tasks and a tokenizer for all tests here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_mergemix.config.evaluate import LmEvalTask
from megatron_mergemix.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer
from megatron_mergemix.evaluate.lm_eval.evaluator import LmEvalEvaluator
from tests.support import llama, lm_eval_tasks

Make = Callable[..., LmEvalEvaluator]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    llama.write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def hugging_face(tokenizer_folder: Path) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(tokenizer_folder)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the data and all local tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    lm_eval_tasks.write(folder)
    return folder


@pytest.fixture
def make(folder: Path) -> Make:
    """Return a function that makes an evaluator of some local tasks, by their names."""

    def evaluator(
        *names: str,
        held_out: Any = None,
        tokenizer: Any = None,
        first_share: float = 1.0,
        **settings: Any,
    ) -> Any:
        files = [str(folder / f"{name}.yaml") for name in names]
        return LmEvalEvaluator(
            {"own": LmEvalTask(tasks=files, **settings)},
            tokenizer=tokenizer or ByteTokenizer(),
            seq_length=512,
            micro_batch_size=4,
            held_out=held_out,
            first_share=first_share,
            seed=2,
        )

    return evaluator
