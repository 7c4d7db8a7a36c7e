"""A finished search and scored reference models, made by hand."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megatron_mergemix.config import Config
from megatron_mergemix.experiment.digests import search_digests, trial_digests
from megatron_mergemix.experiment.named_models import (
    asked_of,
    evaluation_digests,
    publish_evaluation,
)
from megatron_mergemix.experiment.strategy import make_strategy
from megatron_mergemix.files.publishing import publish_json
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.search.journal import Journal
from megatron_mergemix.training_runs.experiment_runs import requested_run
from megatron_mergemix.trials import Score, Scores, Trial, record_of
from megatron_mergemix.validation.references import proxy_word, reference_digests
from tests.support.torch_dist import write_checkpoint

LEARNED = {"math": 0.5, "code": 0.25, "web": 0.25}


def losses(*values: float) -> Scores:
    """Return one loss for each of math, code and web, with a standard error of 0.1."""
    return {
        name: {"loss": Score(value, 0.1, 3, "nats/token", False)}
        for name, value in zip(LEARNED, values, strict=True)
    }


def finish_search(config: Config) -> None:
    """Write a journal whose experts have losses of 1, 2 and 3, and a result."""
    journal = Journal(RunDir(config.run_dir).trials, trial_digests(config))
    experts = iter([losses(1, 2, 3), losses(3, 1, 2), losses(2, 3, 1)])
    for asked in make_strategy(config).ask():
        scores = next(experts) if asked.purpose == "vertex" else losses(9, 9, 9)
        journal.append(Trial(asked.index, asked.purpose, asked.mixture, {}, scores))
    result = {
        "mixture": LEARNED,
        "source": "argmax",
        "utility": 0.5,
        "utility_stderr": None,
        "trials": 41,
        "digests": search_digests(config),
    }
    publish_json(RunDir(config.run_dir).result, result)


def finish_reference(config: Config, name: str, scores: Scores) -> None:
    """Make a reference model look trained, and scored."""
    run = requested_run(config, f"references/{name}")
    run.mark_started()
    write_checkpoint(run.checkpoints / "iter_0000011", {"weight": torch.ones(2)})
    run.mark_finished({"checkpoint": "checkpoints/iter_0000011"})
    record = {
        "scores": record_of(scores),
        "seconds": 3.0,
        "digests": reference_digests(config, name),
    }
    publish_json(run.directory / "scores.json", record)


def score_proxy(config: Config, name: str, scores: Scores) -> None:
    """Put the scores of the merge for a reference's mixture on record."""
    asked = asked_of(config, proxy_word(name))
    publish_evaluation(config, asked, evaluation_digests(config, asked), scores, seconds=2.0)


def finish_references(config: Config, scores: Mapping[str, Scores]) -> None:
    """Finish several reference models; their proxies score the same."""
    for name, values in scores.items():
        finish_reference(config, name, values)
        score_proxy(config, name, values)
