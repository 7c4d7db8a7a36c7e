"""Which surrogate a capability gets, and on what evidence.

``auto`` takes the least leave-one-out error. The rank correlation is recorded too and says
whether a surrogate is of any use, but it is a bad judge between two: it weighs the order of
hopeless mixtures as much as that of good ones, and on a surface with a peak it prefers a
quadratic with four times the error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from megatron_mergemix.search.surrogates import SURROGATES
from megatron_mergemix.search.surrogates.surrogate import Surrogate

Array = NDArray[np.float64]


def spearman(first: Array, second: Array) -> float:
    """Return the rank correlation of two vectors; 0 where one of them is constant."""
    ranks = np.array([rankdata(first), rankdata(second)])
    ranks -= ranks.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(ranks, axis=1)
    return float(ranks[0] @ ranks[1] / norms.prod()) if norms.all() else 0.0


def fit_surrogate(
    choice: str, points: Array, values: Array, stderrs: Array | None
) -> tuple[Surrogate, dict[str, Any]]:
    """Return a fitted surrogate of one capability and the evidence for it.

    Args:
        choice: a name in ``SURROGATES``, or ``auto``: of those with enough rows, the one whose
            leave-one-out predictions have the least squared error.
        points: mixtures ``(N, D)``.
        values: scores ``(N,)``.
        stderrs: ``(N,)``, or None where unknown.

    Returns:
        The surrogate, and ``{"surrogate": name, "spearman": ..., "rmse": ..., "candidates":
        {name: {"spearman", "rmse"} or {"refused": why}}}``; both numbers are leave-one-out.

    Raises:
        SearchError: the chosen surrogate, or every one, has too few rows.
    """
    names = list(SURROGATES) if choice == "auto" else [choice]
    fitted: dict[str, Surrogate] = {}
    evidence: dict[str, dict[str, Any]] = {}
    for name in names:
        surrogate = SURROGATES[name]()
        needed = surrogate.min_rows(points.shape[1])
        if choice == "auto" and len(points) < needed and needed > min_rows(choice, points.shape[1]):
            evidence[name] = {"refused": f"{len(points)} trials, needs {needed}"}
            continue
        surrogate.fit(points, values, stderrs)
        predicted = surrogate.leave_one_out()
        evidence[name] = {
            "spearman": spearman(predicted, values),
            "rmse": float(np.sqrt(np.mean((predicted - values) ** 2))),
        }
        fitted[name] = surrogate
    best = min(fitted, key=lambda name: float(evidence[name]["rmse"]))
    return fitted[best], {"surrogate": best, **evidence[best], "candidates": evidence}


def min_rows(choice: str, num_domains: int) -> int:
    """Return how many trials the chosen surrogate needs; ``auto`` needs the least of all."""
    names = list(SURROGATES) if choice == "auto" else [choice]
    return min(SURROGATES[name].min_rows(num_domains) for name in names)
