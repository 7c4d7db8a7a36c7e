"""Do cheap proxies rank mixtures as really trained models do? The statistics, on plain arrays.

Every function takes N mixtures in one order: what their proxies score and what the models really
trained on them score, higher is better. Intervals are central percentiles of a bootstrap, whose
draws come from :mod:`megatron_mergemix.study.bootstrap`. What is not defined is NaN within the
module and None in what it returns: ranks of equal scores, correlations of fewer than four mixtures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

Array = NDArray[np.float64]

LEAST = 4
"""Mixtures below which a rank correlation says nothing: three agree by chance one time in six."""

LEVEL = 0.95
"""Of every interval."""

_PAIRS_AT_ONCE = 4_000_000


class Draws(NamedTuple):
    """What other mixtures and other items might have shown, ``(B, N)`` each.

    Attributes:
        places: which mixture stands at each place of a draw; some twice, some not at all.
        proxy: its score on the items of that draw.
        trained: the same of the really trained model.
    """

    places: NDArray[np.intp]
    proxy: Array
    trained: Array


def spearman(first: Array, second: Array) -> Array:
    """Return Spearman's rank correlation ``(...,)`` of ``(..., N)``; ties share their mean rank."""
    return _pearson(rankdata(first, axis=-1), rankdata(second, axis=-1))


def kendall(first: Array, second: Array) -> Array:
    """Return Kendall's tau-b ``(...,)`` of ``(..., N)``: pairs in agreement, corrected for ties."""
    i, j = np.triu_indices(first.shape[-1], k=1)
    signs = [np.sign(values[..., i] - values[..., j]) for values in (first, second)]
    untied = np.sqrt((signs[0] ** 2).sum(axis=-1) * (signs[1] ** 2).sum(axis=-1))
    return _ratio((signs[0] * signs[1]).sum(axis=-1), untied)


def regret(proxy: Array, trained: Array, k: int) -> float:
    """Return the utility that is lost by really training only the proxy's k best mixtures.

    Against the best of all. Ties of the proxy are broken to its disadvantage, so that one that
    tells nothing apart is not saved by luck.
    """
    best_first = np.lexsort((trained, -proxy))
    return float(np.max(trained) - np.max(trained[best_first[:k]]))


_CORRELATIONS: dict[str, Callable[[Array, Array], Array]] = {
    "spearman": spearman,
    "kendall": kendall,
}


def rank_correlations(proxy: Array, trained: Array) -> dict[str, float | None]:
    """Return {"spearman", "kendall"} of ``(N,)`` and ``(N,)``."""
    enough = len(proxy) >= LEAST
    return {
        name: _known(correlation(proxy, trained)) if enough else None
        for name, correlation in _CORRELATIONS.items()
    }


def agreement(proxy: Array, trained: Array, draws: Draws) -> dict[str, Any]:
    """Return how well proxies agree with really trained models.

    Args:
        proxy: ``(N,)``.
        trained: ``(N,)``.
        draws: of the same score.

    Returns:
        {"n", "spearman", "kendall" and their "..._interval", "mean_absolute_error", "offset" (by
        how much proxies score more on average), "centred_error" (the mean absolute error without
        the offset)}.
    """
    error = proxy - trained
    found: dict[str, Any] = {"n": len(proxy)}
    for name, value in rank_correlations(proxy, trained).items():
        found[name] = value
        found[f"{name}_interval"] = (
            None if value is None else _interval(_of_draws(_CORRELATIONS[name], draws))
        )
    return {
        **found,
        "mean_absolute_error": float(np.abs(error).mean()),
        "offset": float(error.mean()),
        "centred_error": float(np.abs(error - error.mean()).mean()),
    }


def top_k(proxy: Array, trained: Array, k: int, draws: Draws) -> dict[str, Any]:
    """Return {"regret", "interval"} of :func:`regret`, None where k leaves nothing to choose.

    A draw counts a mixture that stands in it twice once; where most draws leave nothing to choose,
    there is no interval.
    """
    if k >= len(proxy):
        return {"regret": None, "interval": None}
    drawn = []
    for places, scores, truth in zip(*draws, strict=True):
        _, once = np.unique(places, return_index=True)
        left = regret(scores[once], truth[once], k) if len(once) > k else np.nan
        drawn.append(left)
    return {"regret": regret(proxy, trained, k), "interval": _interval(np.array(drawn))}


def coverage(values: Array, low: Array, high: Array) -> float:
    """Return the share of the values ``(N,)`` that lie in their intervals."""
    return float(((values >= low) & (values <= high)).mean())


def without_offset(values: Array, expected: Array) -> Array:
    """Return ``values`` moved by the mean of ``expected - values`` over all others ``(N,)``.

    Each is left out of its own offset, so that a value cannot move itself into an interval.
    """
    gaps = expected - values
    return np.asarray(values + (gaps.sum() - gaps) / (len(gaps) - 1))


def _of_draws(correlation: Callable[[Array, Array], Array], draws: Draws) -> Array:
    """Return the correlation of every draw ``(B,)``, some at a time: pairs take room."""
    num, size = draws.proxy.shape
    parts = range(0, num, max(1, _PAIRS_AT_ONCE // (size * size)))
    step = parts.step
    return np.concatenate(
        [correlation(draws.proxy[a : a + step], draws.trained[a : a + step]) for a in parts]
    )


def _interval(drawn: Array) -> list[float] | None:
    """Return the central interval, None where most draws have no value."""
    known = drawn[~np.isnan(drawn)]
    if len(known) == 0 or 2 * len(known) < len(drawn):
        return None
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(known, [tail, 100 - tail])
    return [float(low), float(high)]


def _pearson(first: Array, second: Array) -> Array:
    a = first - first.mean(axis=-1, keepdims=True)
    b = second - second.mean(axis=-1, keepdims=True)
    return _ratio((a * b).sum(axis=-1), np.sqrt((a**2).sum(axis=-1) * (b**2).sum(axis=-1)))


def _ratio(top: Array, bottom: Array) -> Array:
    """Return ``top / bottom`` within -1 and 1, NaN where the bottom is 0."""
    safe = np.where(bottom > 0, bottom, np.nan)
    return np.asarray(np.clip(top / safe, -1.0, 1.0))


def _known(value: float | Array) -> float | None:
    return None if np.isnan(value) else float(value)
