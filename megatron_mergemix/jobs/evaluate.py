"""The evaluation job: score checkpoints and merges with the evaluators of the search."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from megatron_mergemix.config import Config
from megatron_mergemix.errors import EvaluationError
from megatron_mergemix.evaluate.composite import CompositeEvaluator
from megatron_mergemix.evaluate.make import make_evaluator
from megatron_mergemix.experiment.named_models import (
    NamedModel,
    asked_of,
    evaluation_digests,
    publish_evaluation,
    record_path,
)
from megatron_mergemix.megatron.model import build_model
from megatron_mergemix.megatron.pass_memory import scoring_bytes
from megatron_mergemix.megatron.resident import ResidentProxy
from megatron_mergemix.model_facts import model_facts, vocab_size
from megatron_mergemix.processes.distributed import from_rank_0, rank, together
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.training_runs.experiment_runs import base_checkpoint, expert_checkpoints
from megatron_mergemix.trials import Scores


def evaluate(config: Config, words: Sequence[str]) -> None:
    """Collective: score the models that the words name and that are not on record."""
    chunks = build_model(config, vocab_size(config), seed=0)
    score_missing(config, words, chunks, evaluator_of(config))


def evaluator_of(config: Config) -> CompositeEvaluator:
    """Collective: return the evaluators of the search; commands keep their output elsewhere."""
    assert config.model is not None, "checked when the YAML was loaded"
    logs = RunDir(config.run_dir).evaluate / "commands"
    return make_evaluator(config, config.model.padded_vocab(vocab_size(config)), logs)


def score_missing(
    config: Config,
    words: Sequence[str],
    chunks: Sequence[torch.nn.Module],
    evaluator: CompositeEvaluator,
) -> None:
    """Collective: score the models that the words name and that are not on record.

    Args:
        config: the experiment.
        words: as in :mod:`megatron_mergemix.experiment.named_models`.
        chunks: this rank's part of the model, whose weights are replaced.
        evaluator: scores it.

    Raises:
        EvaluationError: some cannot be scored; names them. The others are on record.
    """
    if failed := score_each(config, words, chunks, evaluator):
        raise EvaluationError("\n".join(failed.values()))


def score_each(
    config: Config,
    words: Sequence[str],
    chunks: Sequence[torch.nn.Module],
    evaluator: CompositeEvaluator,
) -> dict[str, str]:
    """Collective: as :func:`score_missing`, but return why models cannot be scored, by word."""

    def look() -> list[tuple[str, NamedModel, dict[str, str]]]:
        asked = [(word, asked_of(config, word)) for word in words]
        found = [(word, each, evaluation_digests(config, each)) for word, each in asked]
        return [
            (w, each, told) for w, each, told in found if not record_path(config, told).exists()
        ]

    missing = from_rank_0(look)
    merges = [(word, each, told) for word, each, told in missing if each.merge_weights is not None]
    failed: dict[str, str] = {}
    if merges:
        proxy = resident_for(config, chunks, [each for _, each, _ in merges], evaluator)
        for word, each, told in merges:
            publish = partial(publish_evaluation, config, each, told)
            if why := score_one(proxy, evaluator, each, publish):
                failed[word] = why
        del proxy  # its copies of the experts make room for the next
    for word, each, told in missing:
        if each.checkpoint is not None:
            alone = resident_alone(config, chunks, each.checkpoint, evaluator)
            publish = partial(publish_evaluation, config, each, told)
            if why := score_one(alone, evaluator, each, publish):
                failed[word] = why
            del alone
    return failed


def resident_for(
    config: Config,
    chunks: Sequence[torch.nn.Module],
    merges: Sequence[NamedModel],
    evaluator: CompositeEvaluator,
) -> ResidentProxy:
    """Collective: return base and those experts that the merges take."""
    taken = {name for each in merges for name in each.merge_weights or {}}
    experts = {n: path for n, path in expert_checkpoints(config).items() if n in taken}
    wanted = _bytes_of_scoring(config, chunks, evaluator)
    where = config.search.resident
    return ResidentProxy(chunks, base_checkpoint(config), experts, where, wanted=wanted)


def resident_alone(
    config: Config,
    chunks: Sequence[torch.nn.Module],
    checkpoint: Path,
    evaluator: CompositeEvaluator,
) -> ResidentProxy:
    """Collective: return one checkpoint, without any expert."""
    wanted = _bytes_of_scoring(config, chunks, evaluator)
    return ResidentProxy(chunks, checkpoint, experts={}, wanted=wanted)


def _bytes_of_scoring(
    config: Config, chunks: Sequence[torch.nn.Module], evaluator: CompositeEvaluator
) -> int:
    length = model_facts(config).seq_length
    batch = config.evaluate.micro_batch_size
    return scoring_bytes(chunks, batch, length, kept_tokens=evaluator.kept_tokens)


def scores_of_model(
    proxy: ResidentProxy, evaluator: CompositeEvaluator, asked: NamedModel
) -> Scores:
    """Collective: make the proxy the model that is asked for, and score it.

    Raises:
        EvaluationError: it cannot be scored; names the model.
    """
    proxy.apply(asked.merge_weights or {})
    evaluator.begin(asked.file_name)
    try:
        return evaluator.evaluate(proxy)
    except EvaluationError as error:
        raise EvaluationError(f"{asked.name}: {error}") from error


def score_one(
    proxy: ResidentProxy,
    evaluator: CompositeEvaluator,
    asked: NamedModel,
    publish: Callable[[Scores, float], Path],
) -> str | None:
    """Collective: score one model and put it on record.

    Args:
        proxy: is made the model.
        evaluator: scores it.
        asked: the model.
        publish: called on rank 0 with the scores and the seconds that they took; returns the file.

    Returns:
        Why it cannot be scored; None where it was.
    """
    started = time.monotonic()
    try:
        scores = scores_of_model(proxy, evaluator, asked)
    except EvaluationError as error:
        return str(error)
    with together():
        if rank() == 0:
            path = publish(scores, time.monotonic() - started)
            print(f"evaluate: {asked.name}: written to {path}", flush=True)
    return None
