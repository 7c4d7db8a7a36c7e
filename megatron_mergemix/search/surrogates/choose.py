"""Which surrogate a capability gets, and on what evidence.

``auto`` takes the Gaussian process, unless another surrogate with at least its leave-one-out rank
correlation has smaller leave-one-out squared errors by more than one standard error of their
paired differences (the one-standard-error rule of Breiman et al. 1984). Trials of a single
domain do not count in this: to predict a corner from all other trials is to extrapolate, and the
one that is good at that is not the one that is good inside. Neither criterion alone chooses as
well, because at 24 trials the leave-one-out numbers of two surrogates differ by chance. Measured
over nine sizes of synthetic searches (3 to 15 domains, 24 to 112 noisy trials), and on the real
runs of RegMix (arXiv 2407.01492), which are steep near share 0, with 32 and 64 of them:

==============================================  ==================  =======================
choice                                          regret of argmax    rank correlation on
                                                (accuracy points)   unseen real mixtures
==============================================  ==================  =======================
largest rank correlation                        0.48                0.97, 0.98
least squared error                             0.47                0.97, 0.98
stacking for least squared error                0.49                0.96, 0.98
``gp``, always                                  0.33                0.72, 0.86
``gp``, unless another is clearly better        0.38                0.96, 0.98
the same without the trials of a single domain  0.35                0.96, 0.98
==============================================  ==================  =======================

LightGBM is never taken unless it is named, so that nobody needs it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from megatron_mergemix.mixtures.simplex import Array
from megatron_mergemix.search.surrogates import SURROGATES
from megatron_mergemix.search.surrogates.surrogate import Surrogate
from megatron_mergemix.search.surrogates.trees import SmallTrees


def spearman(first: Array, second: Array) -> float:
    """Return the rank correlation of two vectors; 0 where one of them is constant."""
    ranks = np.array([rankdata(first), rankdata(second)])
    ranks -= ranks.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(ranks, axis=1)
    return float(ranks[0] @ ranks[1] / norms.prod()) if norms.all() else 0.0


AUTO = ("gp", "gp_root", "quadratic", "loglinear")
"""What ``auto`` chooses from; the first unless another is clearly better."""

CLEARLY = 1.0
"""Standard errors; from 0.75 to 2 the numbers above are nearly the same."""


SINGLE = 1e-6
"""What may be missing from a share of 1."""


def fit_surrogate(
    choice: str,
    points: Array,
    values: Array,
    stderrs: Array | None,
    judges: NDArray[np.bool_] | None = None,
) -> tuple[Surrogate, dict[str, Any]]:
    """Return a fitted surrogate of one capability and the evidence for it.

    Args:
        choice: a name in ``SURROGATES``, or ``auto``, see the module.
        points: mixtures ``(N, D)``.
        values: scores ``(N,)``.
        stderrs: ``(N,)``, or None where unknown.
        judges: ``(N,)``, which of the rows ``auto`` chooses by; None for all. All are learned.

    Returns:
        The surrogate, and ``{"surrogate": name, "spearman": ..., "rmse": ..., "candidates":
        {name: {"spearman", "rmse", "lead"} or {"refused": why}}}``; the numbers are leave-one-out.
        ``lead``: by how many standard errors the squared errors of trials of more than one domain
        are smaller than those of the first of ``AUTO``.

    Raises:
        SearchError: the chosen surrogate, or every one, has too few rows.
    """
    if choice != "auto":
        surrogate = SURROGATES[choice]()
        surrogate.fit(points, values, stderrs)
        evidence = _evidence(surrogate.leave_one_out(), values)
        return surrogate, {"surrogate": choice, **evidence, "candidates": {choice: evidence}}
    fitted: dict[str, Surrogate] = {}
    candidates: dict[str, dict[str, Any]] = {}
    mixed = points.max(axis=1) < 1 - SINGLE
    if judges is not None:
        mixed &= judges
    for name in AUTO:
        surrogate = SURROGATES[name]()
        needed = surrogate.min_rows(points.shape[1])
        if fitted and len(points) < needed:
            candidates[name] = {"refused": f"{len(points)} trials, needs {needed}"}
            continue
        surrogate.fit(points, values, stderrs)
        fitted[name] = surrogate
        left_out = surrogate.leave_one_out()
        first = fitted[AUTO[0]].leave_one_out()
        lead = _lead(left_out[mixed], first[mixed], values[mixed])
        candidates[name] = {**_evidence(left_out, values), "lead": lead}
    best = AUTO[0]
    for name in fitted:
        found = candidates[name]
        clear = found["lead"] > CLEARLY and found["spearman"] >= candidates[AUTO[0]]["spearman"]
        if clear and found["rmse"] < candidates[best]["rmse"]:
            best = name
    numbers = {key: candidates[best][key] for key in ("spearman", "rmse")}
    return fitted[best], {"surrogate": best, **numbers, "candidates": candidates}


def _evidence(left_out: Array, values: Array) -> dict[str, float]:
    return {
        "spearman": spearman(left_out, values),
        "rmse": float(np.sqrt(np.mean((left_out - values) ** 2))),
    }


def _lead(left_out: Array, other: Array, values: Array) -> float:
    """Return the mean by which the squared errors are smaller, in standard errors of it."""
    if len(values) < 2:
        return 0.0
    gains = (other - values) ** 2 - (left_out - values) ** 2
    error = gains.std(ddof=1) / np.sqrt(len(gains))
    return float(gains.mean() / error) if error > 0 else 0.0


def min_rows(choice: str, num_domains: int) -> int:
    """Return how many trials the chosen surrogate needs; ``auto`` needs those of its first.

    Raises:
        SearchError: the package of the chosen surrogate is not installed.
    """
    if choice == "lightgbm":
        SmallTrees.check_installed()
    return SURROGATES[AUTO[0] if choice == "auto" else choice].min_rows(num_domains)
