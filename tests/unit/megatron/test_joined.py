"""Ranks that groups connect; the groups of real layouts are in ``tests/distributed``."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mergemix.megatron.replicas import joined


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([[0], [1]], [[0], [1]]),
        ([[0, 2], [1, 3]], [[0, 2], [1, 3]]),
        ([[0, 1], [2, 3], [1, 2]], [[0, 1, 2, 3]]),
        ([[4, 5], [0, 1], [2, 3], [3, 4]], [[0, 1], [2, 3, 4, 5]]),
    ],
)
def test_groups_that_share_a_rank_are_one(
    groups: list[list[int]], expected: list[list[int]]
) -> None:
    assert joined(groups) == expected


@given(st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=4), max_size=12))
def test_every_rank_is_in_one_part_and_every_group_within_one(groups: list[list[int]]) -> None:
    parts = joined(groups)
    everyone = [rank for part in parts for rank in part]
    assert sorted(everyone) == sorted({rank for group in groups for rank in group})
    assert all(any(set(group) <= set(part) for part in parts) for group in groups)
    assert parts == joined(reversed(groups))
