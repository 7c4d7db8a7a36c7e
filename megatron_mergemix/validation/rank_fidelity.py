"""Do cheap proxies rank mixtures as really trained models do? The statistics, on plain arrays.

Every function takes N mixtures in one order: what their proxies score and what the models really
trained on them score, higher is better. Intervals rest on draws of a bootstrap, which come from
:mod:`megatron_mergemix.validation.bootstrap`. What is not defined is NaN within the module and None
in what it returns: ranks of equal scores, correlations of fewer than four mixtures, intervals of
fewer than five.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from megatron_mergemix.config.validation import LEAST_RANKED
from megatron_mergemix.mixtures.simplex import Array

LEAST_INTERVAL = 5
"""Mixtures below which there is no interval: of four, any would reach from -1 to 1, nearly."""

LEVEL = 0.95
"""Of every interval."""

_DEVIATIONS = 1.959964
"""Of a normal distribution, on both sides of which ``LEVEL`` lies."""

_PAIRS_AT_ONCE = 4_000_000


class Draws(NamedTuple):
    """What other mixtures and other items might have shown, ``(B, N)`` each.

    Attributes:
        places: which mixture stands at each place of a draw; some twice, some not at all.
        proxy: what the proxy of every mixture, in the order of all, scores on the draw's items.
        trained: the same of the really trained models.
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
    enough = len(proxy) >= LEAST_RANKED
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

    A draw repeats some mixtures, so of few it shows too little: of mixtures in perfect order every
    draw is perfect as well. Its percentiles are therefore widened to the interval that normal pairs
    have (:func:`_normal_interval`). Of normal pairs whose correlation is 0.5 to 0.99 both together
    hold the true one in 93 to 100 % of all sets of 5 to 27 mixtures, percentiles alone in 41 %
    where five mixtures correlate by 0.99.

    Returns:
        {"n", "spearman", "kendall" and their "..._interval", "mean_absolute_error", "offset" (by
        how much proxies score more on average), "centred_error" (the mean absolute error without
        the offset)}.
    """
    error = proxy - trained
    found: dict[str, Any] = {"n": len(proxy)}
    for name, value in rank_correlations(proxy, trained).items():
        found[name] = value
        found[f"{name}_interval"] = None
        if len(proxy) >= LEAST_INTERVAL and value is not None:
            drawn = _interval(_of_draws(_CORRELATIONS[name], draws))
            if drawn is not None:
                ends = [*drawn, value, *_normal_interval(name, value, len(proxy))]
                found[f"{name}_interval"] = [min(ends), max(ends)]
    return {
        **found,
        "mean_absolute_error": float(np.abs(error).mean()),
        "offset": float(error.mean()),
        "centred_error": float(np.abs(error - error.mean()).mean()),
    }


def top_k(proxy: Array, trained: Array, k: int, draws: Draws) -> dict[str, Any]:
    """Return {"regret", "interval"} of :func:`regret`, None where k leaves nothing to choose.

    A set of mixtures drawn with repetition holds 63 % of them, and the best of fewer are not as
    good. So all stay, and what proxies deviate by from a line through the trained scores is dealt
    out anew, with repetition, as if any of them could have met any mixture. For k = 1 the interval
    then holds what other sets of mixtures lose in 89 to 93 % of them (normal and skewed scores, 8
    and 27 mixtures, correlations of 0.8 and 0.95); with mixtures repeated it was 70 to 86 %.
    """
    if k >= len(proxy):
        return {"regret": None, "interval": None}
    found: dict[str, Any] = {"regret": regret(proxy, trained, k), "interval": None}
    if len(proxy) >= LEAST_INTERVAL:
        line, deviations = _line(trained, proxy)
        scores = line + deviations[draws.places] + (draws.proxy - proxy)
        pairs = zip(scores, draws.trained, strict=True)
        found["interval"] = _interval(np.array([regret(*pair, k) for pair in pairs]))
    return found


def coverage(values: Array, low: Array, high: Array) -> float:
    """Return the share of the values ``(N,)`` that lie in their intervals."""
    return float(((values >= low) & (values <= high)).mean())


def without_offset(values: Array, expected: Array) -> Array:
    """Return ``values`` moved by the mean of ``expected - values`` over all others ``(N,)``.

    Each is left out of its own offset, so that a value cannot move itself into an interval.
    """
    gaps = expected - values
    return np.asarray(values + (gaps.sum() - gaps) / (len(gaps) - 1))


def _normal_interval(name: str, value: float, size: int) -> tuple[float, float]:
    """Return the interval of a rank correlation of ``size`` normal pairs.

    By Fisher's transformation, with the variance of Bonett and Wright (2000, Psychometrika 65) for
    Spearman's and of Fieller, Hartley and Pearson (1957, Biometrika 44) for Kendall's. A perfect
    order has no width there; it counts as if one pair of neighbours were exchanged.
    """
    if name == "spearman":
        most = 1 - 12 / (size * (size**2 - 1))
        within = float(np.clip(value, -most, most))
        deviation = np.sqrt((1 + within**2 / 2) / (size - 3))
    else:
        most = 1 - 4 / (size * (size - 1))
        within = float(np.clip(value, -most, most))
        deviation = np.sqrt(0.437 / (size - 4))
    middle, half = np.arctanh(within), _DEVIATIONS * deviation
    return float(np.tanh(middle - half)), float(np.tanh(middle + half))


def _line(given: Array, values: Array) -> tuple[Array, Array]:
    """Return the least-squares line through values ``(N,)``, and what they deviate from it by.

    Deviations are scaled to what they are of the true line, on average.
    """
    centred = given - given.mean()
    square = float(centred @ centred)
    slope = float(centred @ values) / square if square > 0 else 0.0
    line = values.mean() + slope * centred
    return line, (values - line) * np.sqrt(len(values) / (len(values) - 2))


def _of_draws(correlation: Callable[[Array, Array], Array], draws: Draws) -> Array:
    """Return the correlation of every draw ``(B,)``, some at a time: pairs take room."""
    num, size = draws.proxy.shape
    proxy, trained = (
        np.take_along_axis(side, draws.places, axis=1) for side in (draws.proxy, draws.trained)
    )
    parts = range(0, num, max(1, _PAIRS_AT_ONCE // (size * size)))
    step = parts.step
    return np.concatenate([correlation(proxy[a : a + step], trained[a : a + step]) for a in parts])


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
