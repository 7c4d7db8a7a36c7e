"""The first share of the items: which they are, and how scores on it and on the others are joined.

With ``search.first_share`` an evaluator puts the items of every capability into an order whose
beginning is drawn by chance, the same for every candidate. The first ones are scored by themselves,
and the others when they are asked for; then the items of both, one after the other, are all items.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from megatron_mergemix.trials import Score

LEAST = 2
"""Items that a standard error needs."""


def first_count(num_items: int, share: float) -> int:
    """Return how many items are the first ones."""
    return min(num_items, max(LEAST, round(share * num_items)))


def first_to_last(num_items: int, share: float, seed: int) -> NDArray[np.int64]:
    """Return the order of the items: the first ones, drawn by the seed, then all others.

    Both parts keep the order that the items had. A share of 1 changes nothing.
    """
    order = np.random.default_rng([seed, 14]).permutation(num_items)
    count = first_count(num_items, share)
    return np.concatenate([np.sort(order[:count]), np.sort(order[count:])])


def joined(first: Score, others: Score) -> Score:
    """Return the score on the items of both; each is the mean of its items."""
    items = np.array([*first.items, *others.items])
    count = len(items)
    return replace(
        first,
        value=float(items.mean()),
        stderr=float(items.std(ddof=1) / math.sqrt(count)) if count > 1 else None,
        num_samples=count,
        items=(*first.items, *others.items),
    )
