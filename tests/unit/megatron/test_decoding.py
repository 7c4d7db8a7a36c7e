"""How texts are dealt out and go on, without a model."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_mergemix.evaluate.continuations import Prompt
from megatron_mergemix.megatron.decoding import _COPY, _dealt_out, _Text
from megatron_mergemix.megatron.replicas import DataRanks


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 3), st.integers(1, 4))
def test_every_prompt_is_dealt_out_once_in_the_same_waves_whatever_the_ranks(
    count: int, size: int, stages: int, num_ranks: int
) -> None:
    def dealt(num_ranks: int, own: int) -> list[list[list[int]]]:
        return _dealt_out(range(count), size, stages, DataRanks(num_ranks, own, None))

    alone = dealt(1, 0)
    parts = [dealt(num_ranks, own) for own in range(num_ranks)]
    assert len({len(part) for part in parts}) == 1, "all ranks have as many"
    together = [wave for turn in zip(*parts, strict=True) for wave in turn]
    assert together[: len(alone)] == alone
    for wave in together:
        assert [len(batch) for batch in wave] == [size] * stages
    given_out = [number for wave in together for batch in wave for number in batch]
    assert given_out[:count] == list(range(count))
    assert set(given_out[count:]) <= {_COPY}


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
