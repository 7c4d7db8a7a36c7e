"""The evaluator of an experiment: what scores every capability, by its kind."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path

from megatron_mergemix.config import Config
from megatron_mergemix.data.tokenizers import load_tokenizer
from megatron_mergemix.errors import ConfigError
from megatron_mergemix.evaluate.composite import CompositeEvaluator, Part
from megatron_mergemix.evaluate.digests import objective
from megatron_mergemix.evaluate.lm_eval_tasks import lm_eval_evaluator
from megatron_mergemix.evaluate.loss import LossEvaluator
from megatron_mergemix.model_facts import model_facts
from megatron_mergemix.processes.distributed import from_all, rank, together
from megatron_mergemix.run_dir import RunDir


def make_evaluator(config: Config, vocab_rows: int, logs: Path | None = None) -> CompositeEvaluator:
    """Collective: return the evaluator of all capabilities; every rank reads its own copy.

    All ranks must have read the same: whatever lies on another disk, or in another cache, would
    put a number on record that is of no items at all.

    Args:
        config: the experiment.
        vocab_rows: of the model's embedding, padding included.
        logs: folder for the output of commands; default: that of the search.

    Raises:
        ConfigError: the tokenizer has ids that the model lacks, lm-eval refuses its tasks, or
            ranks have read different items.
        DataError: a dataset is too small, or was made with another tokenizer.
    """
    with together():
        if config.evaluate.lm_evals:
            _check_tokenizer(config, vocab_rows)
        metrics = objective(config)
        loss = _loss_evaluator(config, vocab_rows) if config.evaluate.losses else None
        lm_evals = [lm_eval_evaluator(config)] if config.evaluate.lm_evals else []
        evaluator = CompositeEvaluator(metrics, loss, [*lm_evals, *_commands(config, logs)])
        # Commands are read and run by rank 0 alone.
        read_by_all = [*([] if loss is None else [loss]), *lm_evals]
        digests = {name: text for each in read_by_all for name, text in each.digest().items()}
    _check_same_everywhere(digests)
    return evaluator


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


def _commands(config: Config, logs: Path | None) -> list[Part]:
    """Return the evaluator of commands, the slowest of all; imported by those who have some."""
    evaluate, run_dir = config.evaluate, RunDir(config.run_dir)
    if not evaluate.commands:
        return []
    from megatron_mergemix.evaluate.command import CommandEvaluator
    from megatron_mergemix.evaluate.scratch import Scratch

    scratch = None
    if rank() == 0:
        scratch = Scratch(config.run_dir, evaluate.scratch or run_dir.scratch)
    where = logs or run_dir.commands
    return [CommandEvaluator(evaluate.commands, scratch, where, evaluate.commands_at_once)]


def _check_same_everywhere(digests: Mapping[str, str]) -> None:
    """Collective: check that all ranks have read the same items.

    Raises:
        ConfigError: they have not; on every rank alike, with the ranks and what differs.
    """
    everywhere = from_all(digests)
    differences = []
    for name, text in everywhere[0].items():
        others = {number: found[name] for number, found in enumerate(everywhere)}
        others = {number: found for number, found in others.items() if found != text}
        if others:
            parts = zip_longest(text.split("; "), next(iter(others.values())).split("; "))
            here, there = next((one, other) for one, other in parts if one != other)
            ranks = ", ".join(map(str, others))
            differences.append(f"{name}: rank 0 has read {here!r}, but rank {ranks} {there!r}")
    if differences:
        raise ConfigError(
            f"ranks would score different items. {'. '.join(differences)}. Every rank reads "
            "datasets and tasks by itself: let all nodes see the same files and one cache of "
            "`datasets` (HF_HOME), or empty it on all of them."
        )
