"""What other mixtures and other items might have shown of proxies and really trained models.

A draw takes N of the N mixtures, with repetition. Where an evaluator kept the score of every item,
it takes other items as well, the same for all models of a draw: all are scored on the same items,
so what an item does to every model alike does not count. Resampled items add their noise to that
which the scores have already, so intervals of correlations lie a little low rather than high.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megatron_mergemix.evaluate.utility import Scale, Utility
from megatron_mergemix.mixtures.simplex import Array
from megatron_mergemix.trials import Score, Scores
from megatron_mergemix.validation.rank_fidelity import Draws

NUM_DRAWS = 2000

_ITEMS_AT_ONCE = 4_000_000


class Resampled(NamedTuple):
    """Draws of the utility, and of every capability's own oriented score.

    Attributes:
        overall: of the utility.
        capabilities: in the order of the utility's.
        with_items: capabilities whose items were drawn as well.
    """

    overall: Draws
    capabilities: tuple[Draws, ...]
    with_items: tuple[str, ...]


def resampled(
    proxies: Sequence[Scores],
    trained: Sequence[Scores],
    utility: Utility,
    scale: Scale,
    seed: int,
    num: int = NUM_DRAWS,
) -> Resampled:
    """Return ``num`` draws.

    Args:
        proxies: scores of the N proxies.
        trained: of the N really trained models, in the same order.
        utility: what is maximised.
        scale: of the search; taken as exact.
        seed: of the draws.
        num: of draws.
    """
    rng = np.random.default_rng([seed, 7])
    count = len(proxies)
    places = rng.integers(count, size=(num, count))
    models = [*proxies, *trained]
    columns, with_items = [], []
    for name, metrics in utility.objective.items():
        drawn = [_metric([m[name][metric] for m in models], num, rng) for metric in metrics]
        columns.append(np.mean([values for values, _ in drawn], axis=0))
        if all(has_items for _, has_items in drawn):
            with_items.append(name)
    values = np.stack(columns, axis=-1)  # (num, 2N, C)
    return Resampled(
        overall=_draws(utility.combine(values, scale), places),
        capabilities=tuple(_draws(column, places) for column in columns),
        with_items=tuple(with_items),
    )


def _draws(values: Array, places: np.ndarray) -> Draws:
    """Return draws of values ``(B, 2N)``, proxies first."""
    count = values.shape[1] // 2
    return Draws(places, values[:, :count], values[:, count:])


def _metric(scores: Sequence[Score], num: int, rng: np.random.Generator) -> tuple[Array, bool]:
    """Return oriented values ``(num, models)`` on drawn items, and whether there are items."""
    sign = 1.0 if scores[0].higher_is_better else -1.0
    values = np.array([score.value for score in scores])
    size = len(scores[0].items)
    if size < 2 or any(len(score.items) != size for score in scores):
        return np.tile(sign * values, (num, 1)), False
    items = np.array([score.items for score in scores])
    deviations = items - items.mean(axis=1, keepdims=True)
    parts = []
    step = max(1, _ITEMS_AT_ONCE // size)
    for first in range(0, num, step):
        counts = rng.multinomial(size, np.full(size, 1 / size), size=min(step, num - first))
        parts.append(values + counts @ deviations.T / size)
    return sign * np.concatenate(parts), True
