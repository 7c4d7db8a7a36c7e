"""The evaluator of an experiment: what scores every capability, by its kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_mergemix.config import Config
from megatron_mergemix.data.tokenizers import load_tokenizer
from megatron_mergemix.distributed import rank, together
from megatron_mergemix.errors import ConfigError
from megatron_mergemix.evaluate.composite import CompositeEvaluator, Part
from megatron_mergemix.evaluate.digests import objective
from megatron_mergemix.evaluate.lm_eval_evaluator import lm_eval_evaluator
from megatron_mergemix.evaluate.loss import LossEvaluator
from megatron_mergemix.model_facts import model_facts
from megatron_mergemix.run_dir import RunDir


def make_evaluator(config: Config, vocab_rows: int, logs: Path | None = None) -> CompositeEvaluator:
    """Collective: return the evaluator of all capabilities; every rank reads its own copy.

    Args:
        config: the experiment.
        vocab_rows: of the model's embedding, padding included.
        logs: folder for the output of commands; default: that of the search.

    Raises:
        ConfigError: the tokenizer has ids that the model lacks, or lm-eval refuses its tasks.
        DataError: a dataset is too small, or was made with another tokenizer.
    """
    with together():
        if config.evaluate.lm_evals:
            _check_tokenizer(config, vocab_rows)
        metrics = objective(config)
        loss = _loss_evaluator(config, vocab_rows) if config.evaluate.losses else None
        return CompositeEvaluator(metrics, loss, list(_others(config, logs)))


def _check_tokenizer(config: Config, vocab_rows: int) -> None:
    size = load_tokenizer(config.tokenizer).vocab_size
    if size > vocab_rows:
        raise ConfigError(
            f"tokenizer: has {size} ids, but the model's vocabulary has {vocab_rows} rows, so "
            "tasks of lm-eval cannot be scored with it. Name the tokenizer that the model was "
            "trained with."
        )


def _loss_evaluator(config: Config, vocab_rows: int) -> LossEvaluator:
    return LossEvaluator(
        config.evaluate.losses,
        seq_length=model_facts(config).seq_length,
        vocab_size=vocab_rows,
        micro_batch_size=config.evaluate.micro_batch_size,
        held_out=config.evaluate.held_out,
        first_share=config.search.first_share,
        seed=config.search.seed,
    )


def _others(config: Config, logs: Path | None) -> Iterator[Part]:
    """Yield the evaluators of other kinds, the slowest last; imported by those who have them."""
    evaluate, run_dir = config.evaluate, RunDir(config.run_dir)
    if evaluate.lm_evals:
        yield lm_eval_evaluator(config)
    if evaluate.commands:
        from megatron_mergemix.evaluate.command import CommandEvaluator
        from megatron_mergemix.evaluate.scratch import Scratch

        scratch = None
        if rank() == 0:
            scratch = Scratch(config.run_dir, evaluate.scratch or run_dir.scratch)
        where = logs or run_dir.commands
        yield CommandEvaluator(evaluate.commands, scratch, where, evaluate.commands_at_once)
