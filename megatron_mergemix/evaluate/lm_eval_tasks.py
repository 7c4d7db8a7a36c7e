"""The evaluator of lm-eval's tasks: one per process, built when it is first needed. No torch.

Which metrics a capability has, and what its scores depend on, is known only when its tasks are
loaded and their documents read, so whoever asks for either builds the whole.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from megatron_mergemix.data.tokenizers import load_tokenizer
from megatron_mergemix.evaluate.utility import check_kinds
from megatron_mergemix.model_facts import is_known, model_facts

if TYPE_CHECKING:
    from megatron_mergemix.config import Config

_ROOM = "megatron_mergemix.evaluate.lm_eval"
"""By name, so that lm-eval and torch are imported by those who have such capabilities."""

_ANY_LENGTH = 2**30
"""Tokens; more than any text has."""

_built: dict[str, Any] = {}


def check_tasks(config: Config) -> None:
    """Load the tasks of all capabilities and read their documents; no model needed.

    Whoever starts hours of training does so before: a wrong name would end the search after them.
    Before the first launch nobody knows how much text the model sees at once, so that no document
    is too long yet.

    Raises:
        ConfigError: as :func:`lm_eval_evaluator`.
    """
    if config.evaluate.lm_evals:
        _evaluator(config, model_facts(config).seq_length if is_known(config) else _ANY_LENGTH)


def lm_eval_evaluator(config: Config) -> Any:
    """Return the evaluator of all capabilities of the kind ``lm_eval``; every rank has its own.

    Raises:
        ConfigError: lm-eval is not installed, a task is unknown or cannot be run here, or the
            metrics of a capability cannot be averaged.
    """
    return _evaluator(config, model_facts(config).seq_length)


def _evaluator(config: Config, length: int) -> Any:
    settings = {n: task.model_dump(mode="json") for n, task in config.evaluate.lm_evals.items()}
    where = (config.tokenizer, config.evaluate.micro_batch_size, config.evaluate.held_out)
    key = repr((settings, length, *where, config.search.first_share, config.search.seed))
    if key not in _built:
        evaluator = importlib.import_module(f"{_ROOM}.evaluator")
        documents = importlib.import_module(f"{_ROOM}.documents")
        _built.clear()  # documents of other settings are of no use any more
        made = evaluator.LmEvalEvaluator(
            config.evaluate.lm_evals,
            tokenizer=load_tokenizer(config.tokenizer),
            seq_length=length,
            micro_batch_size=config.evaluate.micro_batch_size,
            held_out=documents.held_out_share(config.evaluate.held_out, config.search.seed),
            first_share=config.search.first_share,
            seed=config.search.seed,
        )
        for name, kinds in made.kinds.items():
            check_kinds(name, kinds)
        _built[key] = made
    return _built[key]
