"""What a finished search adds for the report: the scores of the experts themselves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from megatron_mergemix.config import Config
from megatron_mergemix.evaluate.composite import CompositeEvaluator
from megatron_mergemix.experiment.named_models import (
    NamedModel,
    asked_of,
    evaluation_digests,
    publish_evaluation,
    record_path,
)
from megatron_mergemix.jobs.evaluate import score_one
from megatron_mergemix.megatron.resident import ResidentProxy
from megatron_mergemix.processes.distributed import from_rank_0, rank
from megatron_mergemix.trials import Trial


def score_experts(
    config: Config, proxy: ResidentProxy, evaluator: CompositeEvaluator, trials: Sequence[Trial]
) -> None:
    """Collective: put the scores of those experts on record that were no trial.

    With a general share no mixture stands for an expert alone, so that none is a trial. They are
    resident now: a merge of weight one is the expert, bit for bit, and takes no launch of its own.
    The record is that of ``mergemix evaluate mix.yaml experts``, and no part of the search, whose
    journal and result are as without it. One that cannot be scored is said and left out.

    Args:
        config: the experiment.
        proxy: base and experts, resident.
        evaluator: of the search.
        trials: of the search; rank 0 only.
    """

    def look() -> list[tuple[str, NamedModel, dict[str, str]]]:
        asked = {name: asked_of(config, f"expert:{name}") for name in _no_trials(config, trials)}
        found = [(name, each, evaluation_digests(config, each)) for name, each in asked.items()]
        return [
            (n, each, told) for n, each, told in found if not record_path(config, told).exists()
        ]

    missing = from_rank_0(look)
    for name, asked, told in missing:
        in_place = NamedModel(asked.name, merge_weights={name: 1.0})
        publish = partial(publish_evaluation, config, asked, told)
        why = score_one(proxy, evaluator, in_place, publish)
        if why is not None and rank() == 0:
            print(f"evaluate: {why}", flush=True)


def _no_trials(config: Config, trials: Sequence[Trial]) -> list[str]:
    """Return the experts that no trial scored by themselves, on all items."""
    whole = [trial for trial in trials if trial.scores and not trial.error and trial.first is None]
    alone = {
        name
        for trial in whole
        for name, weight in trial.merge_weights.items()
        if weight == 1.0 and sum(map(bool, trial.merge_weights.values())) == 1
    }
    return [name for name in config.expert_names if name not in alone]
