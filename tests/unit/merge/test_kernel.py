"""The compiled kernel gives torch's bits, and whoever lacks it is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mergemix.merge import kernel
from megatron_mergemix.merge.checkpoints import Summary
from megatron_mergemix.merge.linear import weighted_sum_
from megatron_mergemix.offline.options import show

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
DTYPES = st.sampled_from([FLOAT32, BFLOAT16])
BITS = {FLOAT32: torch.int32, BFLOAT16: torch.int16}


def by_torch(out: torch.Tensor, sources: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """Return the sum without the kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "library", lambda: None)
        weighted_sum_(out, sources, weights, torch.empty(1000))
    return out


def random_bits(size: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Return every kind of number that there is, of either sign: subnormal, huge, infinite, NaN."""
    bits = BITS[dtype]
    info = torch.iinfo(bits)
    drawn = torch.randint(info.min, info.max + 1, (size,), generator=generator)
    return drawn.to(bits).view(dtype)


def test_the_kernel_was_compiled() -> None:
    assert kernel.library() is not None, kernel.missing("cpu")


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5000),
    st.lists(st.tuples(DTYPES, st.floats(-3, 3).filter(bool)), min_size=2, max_size=25),
    DTYPES,
    st.integers(0, 99),
)
def test_the_kernel_gives_the_bits_of_torch(
    size: int, terms: list[tuple[torch.dtype, float]], dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sources = [random_bits(size, source, generator) for source, _ in terms]
    weights = [weight for _, weight in terms]
    expected = by_torch(torch.empty(size, dtype=dtype), sources, weights)
    found = torch.empty(size, dtype=dtype)
    kernel.weighted_sum(found, sources, weights)
    # A NaN is one in both; which of its many bit patterns is left to the processor.
    assert torch.equal(found.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    bits = BITS[dtype]
    assert torch.equal(found.view(bits)[numbers], expected.view(bits)[numbers])


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1, 70, 4095])
def test_one_element_that_is_not_finite_is_seen(dtype: torch.dtype, bad: float, place: int) -> None:
    values = torch.full((4096,), torch.finfo(dtype).max, dtype=dtype)
    values[1::2] *= -1
    assert kernel.all_finite(values)
    values[place] = bad
    assert not kernel.all_finite(values)


def test_the_kernel_takes_contiguous_float32_and_bfloat16_only() -> None:
    whole = torch.zeros(4, 4)
    assert kernel.takes(whole, whole.bfloat16())
    for other in (whole.t()[1:, 1:], whole.half(), whole.double(), whole.to("meta")):
        assert not kernel.takes(whole, other)


def test_nothing_beyond_the_result_is_written() -> None:
    room = torch.full((300,), 7.0)
    kernel.weighted_sum(room[100:200], [torch.ones(100), torch.ones(100)], [1.0, 1.0])
    assert room.tolist() == [7.0] * 100 + [2.0] * 100 + [7.0] * 100


def test_sources_of_another_length_are_refused() -> None:
    with pytest.raises(AssertionError):
        kernel.weighted_sum(torch.zeros(4), [torch.ones(4), torch.ones(3)], [1.0, 1.0])


def test_who_merges_without_the_kernel_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = Summary(Path("out/release"), 1, 1, 1.0, {})
    show(summary)
    assert "warning" not in capsys.readouterr().out
    monkeypatch.setattr(kernel, "library", lambda: None)
    show(summary)
    assert f"warning: {kernel.missing('cpu')}" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("offset", [0, 1, 8])
@pytest.mark.parametrize("num", [1, 3, 14])
def test_sums_of_interleaved_copies_reach_tensors_that_begin_anywhere(
    dtype: torch.dtype, offset: int, num: int
) -> None:
    generator = torch.Generator().manual_seed(offset)
    copies = torch.randn(3, num, kernel.BLOCKS[dtype], generator=generator).to(dtype)
    weights = torch.rand(num, generator=generator).tolist()
    if num > 1:
        weights[1] = 0.0
        copies[:, 1] = float("nan")  # a weight of zero is no factor: the copy is not read
    flats = copies.transpose(0, 1).reshape(num, -1)
    room = torch.full((40_000,), 7.0, dtype=dtype)
    across, inside = kernel.BLOCKS[dtype] + 100, 77
    places = [(room, 64, offset, across), (room, 2 * across // 64 * 64, offset + 9000, inside)]
    kernel.weighted_sums(kernel.Outputs(places), copies, weights)
    expected = torch.full((40_000,), 7.0, dtype=dtype)
    for _, start, place, count in places:
        sources = [flat[start : start + count] for flat in flats]
        by_torch(expected[place : place + count], sources, weights)
    assert torch.equal(room, expected)
