"""What it took to rank mixtures by proxies, and what by really training them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from megatron_mergemix.config import Config
from megatron_mergemix.experiment.search_record import measured_trials
from megatron_mergemix.model_facts import model_facts
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.validation.references import proxy_record, reference_record


def costs(config: Config) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the cost of both sides, and what is not on record.

    The proxies took the training of all experts, every trial of the search and the scoring of the
    merges that stand beside the references. The base belongs to neither side. A trial counts with
    its own wall time, also where replicas of the model scored others meanwhile, so with several
    replicas the proxies' seconds are an upper bound.

    Returns:
        {"proxies" and "references": {"runs" (trained), "tokens" (of training), "seconds" (wall
        time of training over all starts, and of scoring), "training_seconds",
        "scoring_seconds"}}; seconds are None where one is not on record.
    """
    run_dir, given = RunDir(config.run_dir), config.experts.checkpoints
    trials = sum(sum(trial.seconds.values()) for trial in measured_trials(config))
    merges = _sum(_seconds(proxy_record(config, name)) for name in config.references)
    experts = [] if given else [run_dir.expert(name) for name in config.expert_names]
    sides = {
        "proxies": _side(
            config,
            len(config.expert_names),
            None
            if given
            else _sum(_seconds(_read(folder / "finished.json")) for folder in experts),
            None if merges is None else trials + merges,
        ),
        "references": _side(
            config,
            len(config.references),
            _sum(
                _seconds(_read(run_dir.reference(name) / "finished.json"))
                for name in config.references
            ),
            _sum(_seconds(reference_record(config, name)) for name in config.references),
        ),
    }
    notes = []
    if given:
        notes.append(
            "The experts are given, so how long their training took is not on record; their tokens "
            "are those of experts.tokens."
        )
    elif any(side["seconds"] is None for side in sides.values()):
        notes.append(
            "How long some runs or scores took is not on record: an older version made them."
        )
    return sides, notes


def _side(
    config: Config, runs: int, training: float | None, scoring: float | None
) -> dict[str, Any]:
    facts = model_facts(config)
    tokens = facts.steps(config.experts.tokens) * facts.global_batch_size * facts.seq_length
    return {
        "runs": runs,
        "tokens": runs * tokens,
        "seconds": _sum([training, scoring]),
        "training_seconds": training,
        "scoring_seconds": scoring,
    }


def _seconds(record: dict[str, Any] | None) -> float | None:
    return None if record is None else record.get("seconds")


def _read(path: Any) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def _sum(seconds: Iterable[float | None]) -> float | None:
    known = list(seconds)
    return None if None in known else sum(value for value in known if value is not None)
