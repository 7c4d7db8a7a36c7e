"""The validation job: really train the reference models, score them and the merges beside them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch

from megatron_mergemix.config import Config
from megatron_mergemix.evaluate.composite import CompositeEvaluator
from megatron_mergemix.jobs.evaluate import evaluator_of, resident_alone, score_missing
from megatron_mergemix.jobs.train import train_all
from megatron_mergemix.megatron.model import build_model
from megatron_mergemix.model_facts import vocab_size
from megatron_mergemix.processes.distributed import from_rank_0, held_by_rank_0, rank, together
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.training_runs.experiment_runs import requested_run
from megatron_mergemix.training_runs.run import TrainingRun
from megatron_mergemix.validation.references import (
    proxy_word,
    publish_scores,
    reference_digests,
    scored_reference,
)


def validate(config: Config, names: Sequence[str]) -> None:
    """Collective: train and score the named references, and the merges for the same mixtures.

    What is done is not done again. Both sides are scored by the same evaluators on all items that
    the search used.
    """
    train_all(config, [f"references/{name}" for name in names])
    chunks = build_model(config, vocab_size(config), seed=0)
    evaluator = evaluator_of(config)
    with ExitStack() as held:
        for name in names:
            # On a cluster, references are scored at the same time in one run_dir, each by one job.
            held.enter_context(held_by_rank_0(RunDir(config.run_dir).lock(f"evaluate/{name}")))
            _score_unless_done(config, name, chunks, evaluator)
        score_missing(config, [proxy_word(name) for name in names], chunks, evaluator)


def _score_unless_done(
    config: Config,
    name: str,
    chunks: Sequence[torch.nn.Module],
    evaluator: CompositeEvaluator,
) -> None:
    """Collective: score one trained reference model and write it down."""
    run, digests = from_rank_0(partial(_look, config, name))
    if digests is None:
        return
    proxy = resident_alone(config, chunks, run.final_checkpoint(), evaluator)
    evaluator.begin(f"reference-{name}")
    started = time.monotonic()
    scores = evaluator.evaluate(proxy)
    with together():
        if rank() == 0:
            publish_scores(config, name, digests, scores, time.monotonic() - started)
            print(f"references/{name}: scored", flush=True)


def _look(config: Config, name: str) -> tuple[TrainingRun, dict[str, str] | None]:
    """Return the run of a reference model, and what its scores depend on; None if it has some."""
    is_scored = scored_reference(config, name) is not None
    run = requested_run(config, f"references/{name}")
    return run, None if is_scored else reference_digests(config, name)
