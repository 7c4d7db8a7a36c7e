"""How requests become micro-batches: shared rows, few calls, nothing lost."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mergemix.evaluate.continuations import (
    _CALL_COST,
    Continuations,
    Request,
    _cuts,
    prepare,
)


def batches(requests: list[Request], max_length: int = 32, size: int = 3) -> Continuations:
    return prepare(requests, max_length=max_length, micro_batch_size=size, vocab_size=50)


def rows_of(continuations: Continuations) -> list[list[int]]:
    """Return every row with its padding."""
    return [row for group in continuations.groups for rows in group.tokens.tolist() for row in rows]


def read_back(continuations: Continuations) -> list[list[tuple[tuple[int, ...], int]]]:
    """Return, for every request, what its targets are: the tokens before, and the token."""
    micro_batches = [rows for group in continuations.groups for rows in group.tokens.tolist()]
    asked: list[tuple[tuple[int, ...], int]] = []
    for number, rows in enumerate(micro_batches):
        first, end = continuations.target_starts[number : number + 2]
        slots = range(*continuations.slot_starts[number : number + 2])
        for target in range(first, end):
            slot = int(continuations.target_slots[target])
            assert slot in slots
            row = rows[int(continuations.slot_rows[slot])]
            position = int(continuations.slot_positions[slot])
            asked.append((tuple(row[: position + 1]), int(continuations.target_tokens[target])))
    found: list[list[tuple[tuple[int, ...], int]]] = [[] for _ in range(continuations.num_requests)]
    for request, target in zip(
        continuations.requests.tolist(), continuations.request_targets.tolist(), strict=True
    ):
        found[request].append(asked[target])
    return found


def expected(request: Request, max_length: int) -> list[tuple[tuple[int, ...], int]]:
    tokens = [*request.context, *request.continuation][-max_length - 1 :]
    first = len(tokens) - len(request.continuation)
    return [(tuple(tokens[:place]), tokens[place]) for place in range(first, len(tokens))]


some_tokens = st.lists(st.integers(0, 3), min_size=1, max_size=9)


@given(st.lists(st.builds(Request, some_tokens, some_tokens), max_size=20), st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_every_request_can_be_read_from_the_batches(requests: list[Request], size: int) -> None:
    found = read_back(batches(requests, max_length=11, size=size))
    assert found == [expected(request, 11) for request in requests]


def test_long_contexts_are_cut_on_the_left() -> None:
    (asked,) = read_back(batches([Request(list(range(20)), [7, 8])], max_length=8))
    assert asked == [(tuple(range(13, 20)), 7), ((*range(13, 20), 7), 8)]


def test_letters_of_one_question_are_read_from_one_row() -> None:
    question = [5, 6, 7]
    found = batches([Request(question, [letter]) for letter in (10, 11, 12, 13)])
    assert found.num_tokens == 3
    assert len(found.slot_rows) == 1
    assert found.target_tokens.tolist() == [10, 11, 12, 13]


def test_identical_requests_are_scored_once() -> None:
    found = batches([Request([1, 2], [3, 4])] * 5)
    assert len(found.target_tokens) == 2
    assert found.request_targets.tolist() == [0, 1] * 5
    assert found.num_tokens == 3


def test_the_beginning_of_another_row_is_no_row_of_its_own() -> None:
    found = batches([Request([1, 2], [3]), Request([1, 2], [3, 4, 5]), Request([1, 2, 3], [9])])
    assert found.num_tokens == 4
    assert len(found.slot_rows) == 3


def test_rows_fall_in_length_and_calls_have_one_length() -> None:
    draw = random.Random(0)
    requests = [
        Request([draw.randrange(50) for _ in range(draw.randint(1, 200))], [1]) for _ in range(300)
    ]
    found = batches(requests, max_length=256, size=4)
    lengths = [len(row) for row in rows_of(found)]
    assert lengths == sorted(lengths, reverse=True)
    assert all(length % 8 == 0 for length in lengths)
    assert 1 < len(found.groups) < 10
    padded = sum(lengths)
    assert found.num_tokens / padded > 0.8
    assert [group.first for group in found.groups[1:]] == [
        sum(len(group.tokens) for group in found.groups[:n]) for n in range(1, len(found.groups))
    ]


def test_no_rows_make_no_calls() -> None:
    found = batches([])
    assert (found.groups, found.num_requests, found.num_tokens) == ((), 0, 0)
    assert found.slot_starts[-1] == found.target_starts[-1] == 0


@given(st.lists(st.integers(1, 6), max_size=7))
@settings(deadline=None)
def test_cuts_cost_least_of_all_ways_to_cut(steps: list[int]) -> None:
    lengths = sorted((8 * step for step in steps), reverse=True)
    bounds = _cuts(lengths)
    assert bounds[0] == 0
    assert bounds[-1] == len(lengths)
    assert cost(lengths, bounds) == min(cost(lengths, each) for each in all_cuts(len(lengths)))


def cost(lengths: list[int], bounds: list[int]) -> int:
    return sum(
        (end - first + _CALL_COST) * lengths[first]
        for first, end in zip(bounds, bounds[1:], strict=False)
    )


def all_cuts(count: int) -> Any:
    if count == 0:
        return [[0]]
    inner = range(1 << (count - 1))
    return [[0, *(n + 1 for n in range(count - 1) if cut >> n & 1), count] for cut in inner]
