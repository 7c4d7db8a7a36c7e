"""The validation job: really train the reference models, and score them as candidates were."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from megatron_mergemix.config import Config
from megatron_mergemix.distributed import from_rank_0, rank
from megatron_mergemix.evaluate.make import make_evaluator
from megatron_mergemix.jobs.train import train_all
from megatron_mergemix.journal import Scores, record_of
from megatron_mergemix.megatron.model import build_model
from megatron_mergemix.megatron.resident import ResidentProxy
from megatron_mergemix.run_dir import publish_json
from megatron_mergemix.training_runs import TrainingRun, requested_run, vocab_size
from megatron_mergemix.validation import reference_digests, scored_reference


def validate(config: Config, names: Sequence[str]) -> None:
    """Collective: train and score the named reference models that are not done yet."""
    train_all(config, [f"references/{name}" for name in names])
    assert config.model is not None, "checked when the YAML was loaded"
    chunks = build_model(config, vocab_size(config), seed=0)
    evaluator = make_evaluator(config, config.model.padded_vocab(vocab_size(config)))
    for name in names:
        run, is_scored = from_rank_0(partial(_look, config, name))
        if is_scored:
            continue
        proxy = ResidentProxy(chunks, base=run.final_checkpoint(), experts={})
        evaluator.begin(f"reference-{name}")
        scores = evaluator.evaluate(proxy)
        if rank() == 0:
            publish_scores(config, name, scores)


def publish_scores(config: Config, name: str, scores: Scores) -> None:
    """Write the scores of a trained reference model beside it; rank 0 only."""
    run = requested_run(config, f"references/{name}")
    publish_json(
        run.directory / "scores.json",
        {
            "mixture": dict(run.mixture),
            "scores": record_of(scores),
            "digests": reference_digests(config, name),
        },
    )


def _look(config: Config, name: str) -> tuple[TrainingRun, bool]:
    """Return the run of a reference model, and whether it is scored."""
    return requested_run(config, f"references/{name}"), scored_reference(config, name) is not None
