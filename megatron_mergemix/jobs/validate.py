"""The validation job: really train the reference models, score them and the merges beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch

from megatron_mergemix.config import Config
from megatron_mergemix.config.validation import how_to_leave_out
from megatron_mergemix.errors import MergeMixError
from megatron_mergemix.evaluate.composite import CompositeEvaluator
from megatron_mergemix.experiment.named_models import NamedModel
from megatron_mergemix.jobs.evaluate import evaluator_of, resident_alone, score_each, score_one
from megatron_mergemix.jobs.train import train_each
from megatron_mergemix.megatron.model import build_model
from megatron_mergemix.model_facts import vocab_size
from megatron_mergemix.processes.distributed import from_rank_0, held_by_rank_0
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

    Raises:
        MergeMixError: references diverged, or they or their merges cannot be scored; says which
            and what to do. The others are on record.
    """
    diverged = train_each(config, [f"references/{name}" for name in names])
    failed = {run.removeprefix("references/"): [why] for run, why in diverged.items()}
    trained = [name for name in names if name not in failed]
    chunks = build_model(config, vocab_size(config), seed=0)
    evaluator = evaluator_of(config)
    with ExitStack() as held:
        for name in trained:
            # On a cluster, references are scored at the same time in one run_dir, each by one job.
            held.enter_context(held_by_rank_0(RunDir(config.run_dir).lock(f"evaluate/{name}")))
            if why := _score_unless_done(config, name, chunks, evaluator):
                failed[name] = [why]
        words = {proxy_word(name): name for name in trained}
        for word, why in score_each(config, list(words), chunks, evaluator).items():
            failed.setdefault(words[word], []).append(why)
    if failed:
        raise MergeMixError(_why_there_is_no_comparison(config, failed))


def _score_unless_done(
    config: Config,
    name: str,
    chunks: Sequence[torch.nn.Module],
    evaluator: CompositeEvaluator,
) -> str | None:
    """Collective: score one trained reference model and write it down; return why it cannot be."""
    run, digests = from_rank_0(partial(_look, config, name))
    if digests is None:
        return None
    asked = NamedModel(f"references/{name}", run.final_checkpoint())
    proxy = resident_alone(config, chunks, run.final_checkpoint(), evaluator)
    return score_one(proxy, evaluator, asked, partial(publish_scores, config, name, digests))


def _look(config: Config, name: str) -> tuple[TrainingRun, dict[str, str] | None]:
    """Return the run of a reference model, and what its scores depend on; None if it has some."""
    is_scored = scored_reference(config, name) is not None
    run = requested_run(config, f"references/{name}")
    return run, None if is_scored else reference_digests(config, name)


def _why_there_is_no_comparison(config: Config, failed: Mapping[str, Sequence[str]]) -> str:
    lines = [line for why in failed.values() for line in why]
    return "\n".join(
        [
            f"{len(failed)} of {len(config.references)} references are not measured, so nothing is "
            f"compared yet: {', '.join(failed)}.",
            *lines,
            "Start it again to try them alone: all others are kept. If they fail again, "
            f"{how_to_leave_out(config, list(failed))}.",
        ]
    )
