"""What the search has measured: scores, gradients and trials, and how they stand on record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Score:
    """One measured number.

    Attributes:
        value: in ``unit``.
        stderr: standard error of ``value`` over the evaluated items, or None where unknown.
        num_samples: evaluated items (sequences, questions).
        unit: ``"nats/token"``, ``"bits/byte"``, ``"accuracy"`` and so on.
        higher_is_better: the direction in which a model improves.
        items: the value of every item, in the same order for every candidate; ``value`` is their
            mean. Candidates are scored on the same items, so their difference is known far better
            than either value. Empty where items are not known.
    """

    value: float
    stderr: float | None
    num_samples: int
    unit: str
    higher_is_better: bool
    items: tuple[float, ...] = ()


Scores = Mapping[str, Mapping[str, Score]]
"""Capability name -> metric name -> score."""


@dataclass(frozen=True)
class Minibatch:
    """Which items of the evaluators a gradient is measured on.

    Items are dealt out anew for every pass through them, so consecutive numbers see all of them
    before they see one again.

    Attributes:
        number: 0, 1, ...
        share: of the items of every capability, above 0 and at most 1.
        seed: of the dealing.
        capabilities: those that are differentiated.
    """

    number: int
    share: float
    seed: int
    capabilities: tuple[str, ...]


@dataclass(frozen=True)
class Gradient:
    """What one backward pass measured.

    Attributes:
        minibatch: what it was measured on.
        scores: of the minibatch alone, so they compare with no trial's scores.
        slopes: capability -> metric -> domain -> derivative of that score by the share of the
            domain, by the chain rule through the merge weights. Shares move independently in it:
            along the simplex only differences between domains mean something.
    """

    minibatch: Minibatch
    scores: Scores
    slopes: Mapping[str, Mapping[str, Mapping[str, float]]]


@dataclass(frozen=True)
class Trial:
    """One candidate with its scores, or its failure.

    Attributes:
        index: the place in the order of asking; unique within a search.
        purpose: why it was asked for, see ``search/purposes.py``.
        mixture: share of training tokens per domain, sums to one; empty for the base itself.
        merge_weights: alpha, one number per expert; sums to one (to zero for the base itself).
        scores: on all items, or on their first share; empty when the trial failed, or measured a
            gradient instead.
        gradient: for strategies that ask for it.
        task_vector_norm: L2 norm of the applied ``sum_k alpha_k (expert_k - base)``.
        seconds: wall seconds by phase (``"merge"``, ``"evaluate"``).
        error: why the trial failed, or None.
        first: share of the items that the scores come from, see ``search.first_share``; None for
            all of them.
    """

    index: int
    purpose: str
    mixture: Mapping[str, float]
    merge_weights: Mapping[str, float]
    scores: Scores
    gradient: Gradient | None = None
    task_vector_norm: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    first: float | None = None


def record_of(scores: Scores) -> dict[str, Any]:
    """Return scores as plain values, for JSON."""
    return {
        capability: {metric: asdict(score) for metric, score in metrics.items()}
        for capability, metrics in scores.items()
    }


def scores_of(record: Mapping[str, Any]) -> Scores:
    """Return the scores that :func:`record_of` made the record of, before or after JSON."""
    return {
        capability: {
            metric: Score(**{**score, "items": tuple(score["items"])})
            for metric, score in metrics.items()
        }
        for capability, metrics in record.items()
    }


def trial_of_record(record: Mapping[str, Any]) -> Trial:
    """Return the trial that ``dataclasses.asdict`` made the record of, after JSON.

    Raises:
        TypeError, KeyError: the record has other fields than a trial.
    """
    gradient = _gradient(record.get("gradient"))
    return Trial(**{**record, "scores": scores_of(record["scores"]), "gradient": gradient})


def _gradient(record: Mapping[str, Any] | None) -> Gradient | None:
    if record is None:
        return None
    minibatch = {**record["minibatch"]}
    minibatch["capabilities"] = tuple(minibatch["capabilities"])
    return Gradient(Minibatch(**minibatch), scores_of(record["scores"]), record["slopes"])
