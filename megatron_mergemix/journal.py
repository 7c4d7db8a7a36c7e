"""What the search has measured: scores, trials, and the append-only file that keeps them.

The file is JSON lines. The first line is the header: digests of everything the trials were
measured on. Every other line is one trial. A line is written with one ``write`` and fsynced, so
a killed search loses at most the trial under way, and the only damage a crash can do is a torn
last line, which is dropped on reading. Anything else that cannot be read is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Score:
    """One measured number.

    Attributes:
        value: in ``unit``.
        stderr: standard error of ``value`` over the evaluated items, or None where unknown.
        num_samples: evaluated items (sequences, questions).
        unit: ``"nats/token"``, ``"bits/byte"``, ``"accuracy"`` and so on.
        higher_is_better: the direction in which a model improves.
    """

    value: float
    stderr: float | None
    num_samples: int
    unit: str
    higher_is_better: bool


Scores = Mapping[str, Mapping[str, Score]]
"""Capability name -> metric name -> score."""


@dataclass(frozen=True)
class Trial:
    """One candidate with its scores, or its failure.

    Attributes:
        index: the place in the order of asking; unique within a search.
        purpose: why it was asked: ``"base"``, ``"vertex"``, ``"lattice"``, ``"prior:uniform"``,
            ``"verify:argmax"``.
        mixture: share of training tokens per domain, sums to one; empty for the base itself.
        merge_weights: alpha, one number per expert; sums to one (to zero for the base itself).
        scores: empty when the trial failed.
        gradient: dU/dlambda per domain, for strategies that ask for it.
        task_vector_norm: L2 norm of the applied ``sum_k alpha_k (expert_k - base)``.
        seconds: wall seconds by phase (``"merge"``, ``"evaluate"``).
        error: why the trial failed, or None.
    """

    index: int
    purpose: str
    mixture: Mapping[str, float]
    merge_weights: Mapping[str, float]
    scores: Scores
    gradient: Mapping[str, float] | None = None
    task_vector_norm: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
