"""How texts are dealt out and go on, without a model."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_mergemix.evaluate.continuations import Prompt
from megatron_mergemix.megatron.kept_keys import _dealt_out, _Text
from megatron_mergemix.megatron.replicas import DataRanks


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 4))
def test_every_prompt_is_dealt_out_in_the_same_micro_batches_whatever_the_ranks(
    count: int, size: int, num_ranks: int
) -> None:
    numbers = list(range(count))
    alone = _dealt_out(numbers, size, DataRanks(1, 0, None))
    parts = [_dealt_out(numbers, size, DataRanks(num_ranks, own, None)) for own in range(num_ranks)]
    assert len({len(part) for part in parts}) == 1, "all ranks have as many"
    together = [batch for turn in zip(*parts, strict=True) for batch in turn]
    assert together[: len(alone)] == alone
    assert {number for batch in together for number in batch} == set(numbers)
    assert all(len(batch) == size for batch in together)


def test_a_text_takes_its_own_tokens_first_and_ends_where_it_is_done() -> None:
    text = _Text(3, Prompt([4, 5, 6], 5))
    seen: list[tuple[int, list[int]]] = []

    def is_done(number: int, tokens: object) -> bool:
        seen.append((number, list(tokens)))  # type: ignore[call-overload]
        return tokens[-1] == 9  # type: ignore[index]

    for place, token in ((1, 8), (2, 8), (3, 7), (4, 9), (5, 1)):
        text.take(token, place, is_done)
    assert (text.new, text.goes_on, text.is_broken) == ([7, 9], False, False)
    assert seen == [(3, [7]), (3, [7, 9])]
    assert [text.token_at(place) for place in range(7)] == [4, 5, 6, 7, 9, 0, 0]


def test_a_text_ends_when_it_is_full_or_its_logits_are_not_finite() -> None:
    full, broken = _Text(0, Prompt([1], 1)), _Text(1, Prompt([1], 4))
    full.take(2, 1, lambda number, tokens: False)
    broken.take(-1, 1, lambda number, tokens: False)
    assert (full.new, full.goes_on, full.is_broken) == ([2], False, False)
    assert (broken.new, broken.goes_on, broken.is_broken) == ([], False, True)
