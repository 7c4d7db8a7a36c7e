"""The weighted sum against float64, at block edges, and what must not be touched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mergemix.merge.linear import BLOCK, base_weight, block_size, weighted_sum_

SIZES = (1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3)
WEIGHTS = st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=5)


def merge(
    sources: list[torch.Tensor], weights: list[float], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    size = len(sources[0])
    out = torch.full((size,), 7.0, dtype=dtype)
    weighted_sum_(out, sources, weights, torch.empty(min(BLOCK, size)))
    return out


def draw(size: int, count: int, seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(dtype) for _ in range(count)]


def exact(sources: list[torch.Tensor], weights: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum in float64 and the sum of absolute terms, which bounds rounding errors."""
    terms = np.array([w * s.double().numpy() for s, w in zip(sources, weights, strict=True)])
    return terms.sum(axis=0), np.abs(terms).sum(axis=0)


def accumulator_error(weights: list[float], scale: np.ndarray) -> np.ndarray:
    """Return by how much a float32 accumulator may be off.

    Each product, each addition and each weight rounds once; the last term is for subnormal numbers.
    """
    return (len(weights) + 1) * (2.0**-24 * scale + 2.0**-149)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(SIZES), WEIGHTS, st.integers(0, 99))
def test_float32_is_the_exact_sum_to_float32_rounding(
    size: int, weights: list[float], seed: int
) -> None:
    sources = draw(size, len(weights), seed, torch.float32)
    expected, scale = exact(sources, weights)
    error = np.abs(merge(sources, weights).double().numpy() - expected)
    assert (error <= accumulator_error(weights, scale)).all()


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(SIZES), WEIGHTS, st.integers(0, 99))
def test_bfloat16_is_rounded_once(size: int, weights: list[float], seed: int) -> None:
    sources = draw(size, len(weights), seed, torch.bfloat16)
    expected, scale = exact(sources, weights)
    found = merge(sources, weights, torch.bfloat16).double().numpy()
    # Half a unit of the last of 8 bits, and what the float32 accumulator was off before.
    exponent = np.floor(np.log2(np.maximum(np.abs(expected), 2.0**-126)))
    allowed = 2.0 ** (exponent - 8) + accumulator_error(weights, scale)
    assert (np.abs(found - expected) <= 1.01 * allowed).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 3000), st.integers(0, 99), st.data())
def test_a_part_merges_to_the_part_of_the_merge(size: int, seed: int, data: st.DataObject) -> None:
    """Bit for bit, wherever ranks cut: vector units and their remainders must agree."""
    first = data.draw(st.integers(0, size - 1))
    last = data.draw(st.integers(first + 1, size))
    weights = [0.3, -0.7, 0.9, 0.5]
    sources = draw(size, len(weights), seed, torch.float32)
    part = merge([source[first:last] for source in sources], weights)
    assert torch.equal(part, merge(sources, weights)[first:last])


@pytest.mark.parametrize("size", SIZES)
def test_a_source_of_weight_zero_is_not_read(size: int) -> None:
    good, also_good = draw(size, 2, 0, torch.float32)
    bad = torch.full((size,), float("nan"))
    found = merge([bad, good, bad, also_good, bad], [0.0, 0.25, 0.0, 0.5, -0.0])
    assert torch.equal(found, merge([good, also_good], [0.25, 0.5]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_hot_weights_copy_bit_for_bit(dtype: torch.dtype) -> None:
    """Also what arithmetic would change: signed zeros, subnormals and NaN with its payload."""
    bits = {torch.float32: torch.int32}.get(dtype, torch.int16)
    source = draw(BLOCK + 3, 1, 1, dtype)[0]
    source[:4] = torch.tensor([-0.0, 1e-45, float("inf"), float("nan")]).to(dtype)
    source.view(bits)[4] = 1
    found = merge([torch.full_like(source, 3.0), source], [0.0, 1.0], dtype)
    assert torch.equal(found.view(bits), source.view(bits))


def test_no_weight_at_all_gives_zeros() -> None:
    bad = torch.full((9,), float("nan"))
    assert torch.equal(merge([bad, bad], [0.0, 0.0]), torch.zeros(9))


def test_the_result_keeps_the_storage_of_the_parameter() -> None:
    out = torch.zeros(8)
    address = out.data_ptr()
    weighted_sum_(out, [torch.ones(8), torch.ones(8)], [0.5, 1.0], torch.empty(8))
    assert out.data_ptr() == address
    assert torch.equal(out, torch.full((8,), 1.5))


def test_sources_may_have_another_dtype_than_the_result() -> None:
    source = torch.tensor([1.0, 2.0**-20], dtype=torch.float32)
    found = merge([source, torch.ones(2, dtype=torch.bfloat16)], [1.0, 1.0])
    assert found.tolist() == [2.0, 1.0 + 2.0**-20]


def test_sources_and_weights_of_different_number_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        merge([torch.ones(2), torch.ones(2)], [1.0])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_the_base_drops_out_of_weights_that_sum_to_one(shares: list[float]) -> None:
    shares[0] += 1e-3
    total = sum(shares)
    assert base_weight([share / total for share in shares]) == 0.0


def test_the_base_weighs_what_the_experts_leave() -> None:
    assert base_weight([]) == 1.0
    assert base_weight([0.25, 0.5]) == 0.25
    assert base_weight([0.9, 0.6]) == pytest.approx(-0.5)
    assert base_weight([1.0 - 1e-9]) == pytest.approx(1e-9)  # more than rounding residue


@pytest.mark.parametrize("length", [1, 7, 100])
def test_the_accumulator_decides_the_block_and_not_the_result(length: int) -> None:
    sources = draw(100, 3, 4, torch.float32)
    weights = [0.5, -0.25, 0.7]
    out = torch.empty(100)
    weighted_sum_(out, sources, weights, torch.empty(length))
    assert torch.equal(out, merge(sources, weights))


def test_blocks_are_larger_on_a_gpu_where_launches_cost() -> None:
    assert block_size(torch.device("cpu")) == BLOCK
    assert block_size(torch.device("cuda")) >= 64 * BLOCK
