"""The mixture that RegMix (arXiv 2407.01492) would choose from short runs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from megatron_mergemix.mixtures.simplex import dense_points, to_vector, whole_simplex
from megatron_mergemix.search.selection import top_mean
from megatron_mergemix.search.surrogates import SURROGATES

TOP = 128
"""Mixtures of the highest prediction that are averaged; RegMix's own number."""


def regmix_mixture(
    trained: Mapping[str, Mapping[str, float]],
    bpb: NDArray[np.float64],
    surrogate: str,
    seed: int,
) -> dict[str, float]:
    """Return the mean of the mixtures whose predicted mean bits per byte are least.

    A surrogate learns each domain's bits per byte. RegMix's is LightGBM, here with leaves small
    enough for this few runs: with its own settings, made for 512, it would predict a constant.

    Args:
        trained: name -> mixture of the short runs.
        bpb: ``(runs, domains)``.
        surrogate: its name.
        seed: of the candidates.
    """
    domains = list(next(iter(trained.values())))
    points = np.array([to_vector(mixture, domains) for mixture in trained.values()])
    bounds = whole_simplex(len(domains))
    candidates = dense_points(bounds, np.random.default_rng(seed))
    predicted = np.zeros(len(candidates))
    for column in bpb.T:
        fitted = SURROGATES[surrogate]()
        fitted.fit(points, column, None)
        predicted += fitted.predict(candidates)[0]
    best = top_mean(candidates, -predicted, TOP)
    return {domain: float(share) for domain, share in zip(domains, best, strict=True)}
