"""Which items are the first ones, and scores that are joined of two parts."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_mergemix.evaluate.first_items import first_count, first_to_last, joined
from megatron_mergemix.trials import Score


def score(items: tuple[float, ...]) -> Score:
    return Score(float(np.mean(items)), 9.9, len(items), "accuracy", True, items)


@pytest.mark.parametrize(
    ("num", "share", "expected"),
    [(40, 0.25, 10), (40, 1.0, 40), (7, 0.01, 2), (1, 0.5, 1), (10, 0.99, 10)],
)
def test_the_first_items_are_that_share_and_at_least_two(num, share, expected) -> None:
    assert first_count(num, share) == expected


def test_the_order_holds_every_item_once_and_both_parts_keep_theirs() -> None:
    order = first_to_last(100, 0.3, seed=5)
    assert sorted(order) == list(range(100))
    assert (np.diff(order[:30]) > 0).all()
    assert (np.diff(order[30:]) > 0).all()
    assert order[29] > 50  # drawn from all of them, not from the beginning


def test_the_seed_decides_and_a_share_of_one_changes_nothing() -> None:
    assert first_to_last(50, 0.5, seed=1).tolist() == first_to_last(50, 0.5, seed=1).tolist()
    assert first_to_last(50, 0.5, seed=1).tolist() != first_to_last(50, 0.5, seed=2).tolist()
    assert first_to_last(50, 1.0, seed=1).tolist() == list(range(50))


def test_a_joined_score_is_that_of_all_its_items() -> None:
    whole = joined(score((1.0, 0.0)), score((1.0, 1.0, 0.0)))
    assert whole.items == (1.0, 0.0, 1.0, 1.0, 0.0)
    assert (whole.value, whole.num_samples) == (0.6, 5)
    assert whole.stderr == pytest.approx(np.std(whole.items, ddof=1) / 5**0.5)
    assert (whole.unit, whole.higher_is_better) == ("accuracy", True)
