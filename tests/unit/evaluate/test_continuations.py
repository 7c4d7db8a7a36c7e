"""How requests become micro-batches: shared rows, few calls, nothing lost."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mergemix.evaluate.continuations import (
    Continuations,
    Request,
    prepare,
)
from megatron_mergemix.evaluate.micro_batches import CALL_COST, cuts
from tests.support.row_tokens import num_tokens


def batches(requests: list[Request], max_length: int = 32, size: int = 3) -> Continuations:
    return prepare(requests, max_length=max_length, micro_batch_size=size, vocab_size=50)


def rows_of(continuations: Continuations) -> list[list[int]]:
    """Return every row with its padding."""
    return [row for rows, _ in passes_of(continuations) for row in rows]


def passes_of(continuations: Continuations) -> list[tuple[list[list[int]], list[list[int]]]]:
    """Return the rows of every pass, and the tokens that each of them goes on from."""
    found: list[tuple[list[list[int]], list[list[int]]]] = []
    for group in continuations.groups:
        assert group.first == len(found)
        first, *later = (tokens.tolist() for tokens in group.passes)
        found += [(rows, [[] for _ in rows]) for rows in first]
        kept = [
            [row[:begins] for row in rows] for rows, begins in zip(first, group.begins, strict=True)
        ]
        for micro_batches in later:
            found += list(zip(micro_batches, kept, strict=True))
    return found


def read_back(continuations: Continuations) -> list[list[tuple[tuple[int, ...], int]]]:
    """Return, for every request, what its targets are: the tokens before, and the token."""
    asked: list[tuple[tuple[int, ...], int]] = []
    for number, (rows, kept) in enumerate(passes_of(continuations)):
        first, end = continuations.target_starts[number : number + 2]
        slots = range(*continuations.slot_starts[number : number + 2])
        for target in range(first, end):
            slot = int(continuations.target_slots[target])
            assert slot in slots
            place = int(continuations.slot_rows[slot])
            end = int(continuations.slot_positions[slot]) + 1
            before = (*kept[place], *rows[place][:end])
            asked.append((before, int(continuations.target_tokens[target])))
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


def questions(draw: random.Random, lengths: list[int], choices: int, most: int) -> list[Request]:
    """Return requests of questions with contexts of these lengths and up to so many choices."""
    return [
        Request(context, [draw.randrange(4) for _ in range(draw.randint(1, most))])
        for length in lengths
        for context in [[draw.randrange(50) for _ in range(length)]]
        for _ in range(draw.randint(1, choices))
    ]


@given(st.integers(0, 10**6), st.lists(st.integers(1, 60), max_size=9), st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_every_request_can_be_read_where_contexts_are_shared(
    seed: int, lengths: list[int], size: int
) -> None:
    requests = questions(random.Random(seed), lengths, 11, 7)
    found = batches(requests, max_length=48, size=size)
    wanted = [expected(request, 48) for request in requests]
    assert read_back(found) == wanted
    if found.shared is not None:
        assert read_back(found.shared.continuations) == wanted
        some = read_back(found.shared.sample)
        assert some == read_back(found.shared.sample_by_rows)
        assert some
        assert all(each in wanted for each in some)


def test_the_choices_of_a_question_share_its_context() -> None:
    context = list(range(40))
    choices = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [1, 2]]
    found = batches([Request(context, choice) for choice in choices], max_length=64, size=1)
    assert num_tokens(found) == 3 * (40 + 2)  # what is asked for behind 1 is read from [1, 2, 3]
    assert found.shared is not None
    assert num_tokens(found.shared.continuations) == 40 + 3 * 2
    (group,) = found.shared.continuations.groups
    assert [tokens.shape[-1] for tokens in group.passes] == [40, 8, 8, 8]


def test_what_is_asked_for_right_behind_a_context_is_asked_for_once() -> None:
    requests = [Request(list(range(40)), [choice, 5]) for choice in range(4)]
    found = batches(requests, max_length=64, size=1).shared
    assert found is not None
    # The first token of all choices is read from one slot, the second of each from its own.
    assert len(found.continuations.slot_rows) == 1 + 4


def test_short_contexts_and_single_choices_are_run_as_they_are() -> None:
    assert batches([Request([1, 2], [3, 4]), Request([1, 2], [5, 6])]).shared is None
    lone = [Request([n, *range(20)], [3, 4]) for n in range(5)]
    assert batches(lone, max_length=64).shared is None
    letters = [Request(list(range(20)), [letter]) for letter in range(4)]
    assert batches(letters, max_length=64).shared is None


def test_sharing_is_less_work_unless_passes_are_too_small_or_contexts_too_unlike() -> None:
    requests = [Request(range(40), [choice, 5]) for choice in range(4)]
    rows = batches(requests, max_length=96, size=1)
    assert rows.shared is not None
    shared = rows.shared.continuations
    for is_uniform in (False, True):
        assert rows.work(1, is_uniform, 0) == 4 * 48
        assert shared.work(1, is_uniform, 0) == 40 + 4 * 8
    # A pass over 8 tokens takes as long as one over 100.
    assert rows.work(1, False, 100) == 4 * 100
    assert shared.work(1, False, 100) == 5 * 100


def test_micro_batches_that_run_together_are_as_long_as_the_longest() -> None:
    requests = [Request(range(n), [choice, 5]) for n in (40, 80) for choice in range(2)]
    found = batches(requests, max_length=96, size=1).shared
    assert found is not None
    assert found.continuations.work(2, False, 0) == (80 + 2 * 8) + (40 + 2 * 8)
    assert found.continuations.work(2, True, 0) == 2 * (80 + 2 * 8)
    assert found.continuations.longest_kept == 80 + 8


def test_a_micro_batch_ends_where_contexts_get_much_shorter() -> None:
    requests = [Request(range(n), [choice, 5]) for n in (80, 72, 24) for choice in range(2)]
    found = batches(requests, max_length=96, size=4).shared
    assert found is not None
    (group,) = found.continuations.groups
    assert group.begins == (72, 24)


def test_what_goes_on_from_a_context_is_known() -> None:
    requests = [Request(range(20), [choice, 5, 6][:n]) for choice, n in ((1, 3), (2, 3), (3, 1))]
    found = batches(requests)
    assert found.shared is not None
    assert found.shared.goes_on.tolist() == [False, True, True, False, True, True, False]


def test_a_context_within_another_gets_what_that_leaves() -> None:
    short = [Request(range(30), [choice, 5]) for choice in range(3)]
    long = [Request([*range(30), 7, 7, 7], [choice, 5]) for choice in range(3)]
    for requests in ([*short, *long], [*long, *short]):
        found = batches(requests, max_length=96, size=1).shared
        assert found is not None
        assert sorted(begins for g in found.continuations.groups for begins in g.begins) == [30, 33]


def test_a_context_of_many_choices_fills_micro_batches() -> None:
    context = list(range(40))
    requests = [Request(context, [n % 50, n // 50, 1]) for n in range(60)]
    found = batches(requests, max_length=64, size=8).shared
    assert found is not None
    (group,) = found.continuations.groups
    assert len(group.begins) == 1  # one micro-batch of eight parts
    assert len(group.passes) == 1 + 8


def test_long_contexts_are_cut_on_the_left() -> None:
    (asked,) = read_back(batches([Request(list(range(20)), [7, 8])], max_length=8))
    assert asked == [(tuple(range(13, 20)), 7), ((*range(13, 20), 7), 8)]


def test_letters_of_one_question_are_read_from_one_row() -> None:
    question = [5, 6, 7]
    found = batches([Request(question, [letter]) for letter in (10, 11, 12, 13)])
    assert num_tokens(found) == 3
    assert len(found.slot_rows) == 1
    assert found.target_tokens.tolist() == [10, 11, 12, 13]


def test_identical_requests_are_scored_once() -> None:
    found = batches([Request([1, 2], [3, 4])] * 5)
    assert len(found.target_tokens) == 2
    assert found.request_targets.tolist() == [0, 1] * 5
    assert num_tokens(found) == 3


def test_the_beginning_of_another_row_is_no_row_of_its_own() -> None:
    found = batches([Request([1, 2], [3]), Request([1, 2], [3, 4, 5]), Request([1, 2, 3], [9])])
    assert num_tokens(found) == 4
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
    assert num_tokens(found) / padded > 0.8
    assert [group.first for group in found.groups[1:]] == [
        sum(len(group.begins) for group in found.groups[:n]) for n in range(1, len(found.groups))
    ]


def test_no_rows_make_no_calls() -> None:
    found = batches([])
    assert (found.groups, found.num_requests, num_tokens(found)) == ((), 0, 0)
    assert found.slot_starts[-1] == found.target_starts[-1] == 0


@given(st.lists(st.integers(1, 6), max_size=7))
@settings(deadline=None)
def test_cuts_cost_least_of_all_ways_to_cut(steps: list[int]) -> None:
    lengths = sorted((8 * step for step in steps), reverse=True)
    bounds = cuts(lengths)
    assert bounds[0] == 0
    assert bounds[-1] == len(lengths)
    assert cost(lengths, bounds) == min(cost(lengths, each) for each in all_cuts(len(lengths)))


def cost(lengths: list[int], bounds: list[int]) -> int:
    return sum(
        (end - first + CALL_COST) * lengths[first]
        for first, end in zip(bounds, bounds[1:], strict=False)
    )


def all_cuts(count: int) -> Any:
    if count == 0:
        return [[0]]
    inner = range(1 << (count - 1))
    return [[0, *(n + 1 for n in range(count - 1) if cut >> n & 1), count] for cut in inner]
