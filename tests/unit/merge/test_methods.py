"""The arithmetic of every method against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_mergemix.merge.linear import BLOCK
from megatron_mergemix.merge.masks import kept
from megatron_mergemix.merge.methods import METHODS, Recipe
from megatron_mergemix.merge.scan import products, thresholds
from megatron_mergemix.merge.slices import Slice
from megatron_mergemix.merge.sphere import spherical_weights

NAME = "embedding.word_embeddings.weight"
numbers = st.floats(-4, 4, width=32)
weights = st.floats(-2, 2).filter(lambda w: abs(w) > 1e-3)
positive = st.floats(0.01, 2)
sizes = st.sampled_from([1, 2, 7, 64, 1001])


def models(count: int, size: int, seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(size, generator=generator)
    steps = [0.1 * torch.randn(size, generator=generator) for _ in range(count)]
    return [base.to(dtype), *((base + step).to(dtype) for step in steps)]


def apply(recipe: Recipe, sources: list[torch.Tensor], dtype=torch.float32) -> np.ndarray:
    out = torch.full_like(sources[0], math.nan, dtype=dtype)
    place = Slice(NAME, (0,), tuple(out.shape), 0, 0)
    accumulator = torch.full((BLOCK,), math.nan)
    METHODS[recipe.method].merge(recipe, place, out, sources, accumulator)
    return out.double().numpy()


def float64(sources: list[torch.Tensor]) -> list[np.ndarray]:
    return [source.double().numpy() for source in sources]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(weights, min_size=1, max_size=4),
    positive,
    sizes,
    st.integers(0, 99),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_task_arithmetic_is_the_scaled_sum_of_task_vectors(ws, scale, size, seed, dtype) -> None:
    recipe = Recipe("task_arithmetic", tuple(ws), scale)
    sources = models(len(ws), size, seed, dtype)
    base, *experts = float64(sources)
    expected = base + scale * sum(w * (e - base) for w, e in zip(ws, experts, strict=True))
    read = sources if recipe.base_is_read() else sources[1:]
    bound = 1e-5 * (1 + scale * sum(map(abs, ws)))
    np.testing.assert_allclose(apply(recipe, read), expected, rtol=0, atol=bound)


@settings(max_examples=40, deadline=None)
@given(st.lists(positive, min_size=1, max_size=4), sizes, st.integers(0, 99))
def test_linear_is_the_weighted_mean_rounded_once(ws, size, seed) -> None:
    ws = [w / sum(ws) for w in ws]
    recipe = Recipe("linear", tuple(ws))
    assert not recipe.base_is_read()
    sources = models(len(ws), size, seed, torch.bfloat16)[1:]
    exact = sum(w * e for w, e in zip(ws, float64(sources), strict=True))
    merged = apply(recipe, sources, torch.bfloat16)
    # Half a unit in the last of 8 binary digits, and what fp32 adds to it.
    np.testing.assert_allclose(merged, exact, rtol=2**-8 * (1 + 1e-3), atol=1e-6)


def ties_oracle(sources, ws, scale, density) -> tuple[np.ndarray, np.ndarray]:
    """Return the merge, and where no sign is elected: the sum is zero up to rounding."""
    base, *experts = float64(sources)
    size = len(base)
    keep = max(1, min(size, round(density * size)))
    trimmed = []
    for expert in experts:
        delta = (expert.astype(np.float32) - base.astype(np.float32)).astype(np.float64)
        threshold = np.sort(np.abs(delta))[size - keep]
        trimmed.append(np.where(np.abs(delta) >= threshold, delta, 0.0))
    votes = [w * t for w, t in zip(ws, trimmed, strict=True)]
    elected = sum(votes)
    strength = sum(map(np.abs, votes))
    tied = (np.abs(elected) <= 1e-6 * strength) & (strength > 0)
    sign = np.where(elected >= 0, 1.0, -1.0)
    total, mass = np.zeros(size), np.zeros(size)
    for w, t in zip(ws, trimmed, strict=True):
        agrees = np.sign(t) == sign
        total += np.where(agrees, w * t, 0.0)
        mass += np.where(agrees, w, 0.0)
    return base + scale * total / np.where(mass == 0, 1.0, mass), tied


@settings(max_examples=60, deadline=None)
@example([1.3078264293819635, 1.0, 1.3078264293819635], 1.0, 0.5, 64, 7, torch.bfloat16)
@given(
    st.lists(positive, min_size=1, max_size=4),
    positive,
    st.floats(0.05, 1),
    sizes,
    st.integers(0, 99),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_ties_trims_elects_and_averages(ws, scale, density, size, seed, dtype) -> None:
    sources = models(len(ws), size, seed, dtype)
    recipe = Recipe("ties", tuple(ws), scale, density)
    found = thresholds(recipe, lambda: iter([[s[:5] for s in sources], [s[5:] for s in sources]]))
    recipe = Recipe("ties", tuple(ws), scale, density, facts={(NAME, ()): found})
    expected, tied = ties_oracle(sources, ws, scale, density)
    merged = np.where(tied, expected, apply(recipe, sources))
    np.testing.assert_allclose(merged, expected, rtol=0, atol=1e-5 * (1 + scale))


def test_ties_of_the_paper_on_numbers_by_hand() -> None:
    base = torch.zeros(4)
    first, second = torch.tensor([3.0, -1.0, 0.2, 2.0]), torch.tensor([1.0, 2.0, 0.1, -1.0])
    recipe = Recipe("ties", (1.0, 1.0), 1.0, 0.75)
    found = thresholds(recipe, lambda: iter([[base, first, second]]))
    assert found == [1.0, 1.0]
    recipe = Recipe("ties", (1.0, 1.0), 1.0, 0.75, facts={(NAME, ()): found})
    assert apply(recipe, [base, first, second]).tolist() == [2.0, 2.0, 0.0, 2.0]


@settings(max_examples=30, deadline=None)
@given(st.lists(weights, min_size=1, max_size=3), st.floats(0.1, 1), sizes, st.integers(0, 99))
def test_dare_drops_and_rescales(ws, density, size, seed) -> None:
    sources = models(len(ws), size, seed, torch.float32)
    recipe = Recipe("dare", tuple(ws), 0.7, density, seed)
    base, *experts = float64(sources)
    place = Slice(NAME, (0,), (size,), 0, 0)
    masks = [kept(seed, k, place, slice(0, size), density).numpy() for k in range(len(ws))]
    expected = base + 0.7 * sum(
        w * m * (e - base) / density for w, m, e in zip(ws, masks, experts, strict=True)
    )
    bound = 1e-5 * (1 + sum(map(abs, ws)) / density)
    np.testing.assert_allclose(apply(recipe, sources), expected, rtol=0, atol=bound)


def test_masks_have_the_density_and_are_independent() -> None:
    place = Slice(NAME, (0, 0), (1000, 200), 0, 0)
    whole = slice(0, 200_000)
    first, second = (kept(7, k, place, whole, 0.3).double() for k in (0, 1))
    for mask in (first, second, kept(8, 0, place, whole, 0.3).double()):
        assert abs(mask.mean().item() - 0.3) < 4 * math.sqrt(0.21 / 200_000)
    assert abs((first * second).mean().item() - 0.09) < 4 * math.sqrt(0.09 / 200_000)
    neighbours = (first[1:] * first[:-1]).mean().item()
    assert abs(neighbours - 0.09) < 4 * math.sqrt(0.09 / 200_000)


def test_a_mask_depends_on_the_place_alone() -> None:
    whole = kept(7, 0, Slice(NAME, (0, 0), (10, 6), 0, 0), slice(0, 60), 0.5).view(10, 6)
    part = kept(7, 0, Slice(NAME, (4, 2), (3, 4), 5, 9), slice(2, 12), 0.5)
    assert torch.equal(part, whole[4:7, 2:6].reshape(-1)[2:])


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 1), st.integers(2, 50), st.integers(0, 99), st.floats(0.01, 3))
def test_slerp_of_two_is_slerp(t, size, seed, spread) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, size))
    x[1] = x[0] + spread * x[1]
    lengths = np.linalg.norm(x, axis=1)
    u = x / lengths[:, None]
    angle = 2 * math.atan2(np.linalg.norm(u[0] - u[1]), np.linalg.norm(u[0] + u[1]))
    coefficients = spherical_weights(x @ x.T, [1 - t, t])
    direction = (math.sin((1 - t) * angle) * u[0] + math.sin(t * angle) * u[1]) / math.sin(angle)
    expected = direction * ((1 - t) * lengths[0] + t * lengths[1])
    np.testing.assert_allclose(coefficients @ x, expected, atol=1e-6 * lengths.max())


@settings(max_examples=30, deadline=None)
@given(st.lists(positive, min_size=3, max_size=5), st.integers(6, 40), st.integers(0, 99))
def test_slerp_of_many_is_stationary_on_the_sphere(ws, size, seed) -> None:
    w = np.array(ws) / sum(ws)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=size) + 0.3 * rng.normal(size=(len(w), size))
    lengths = np.linalg.norm(x, axis=1)
    mean = spherical_weights(x @ x.T, w) @ x
    assert np.linalg.norm(mean) == pytest.approx(w @ lengths, rel=1e-9)
    mean /= np.linalg.norm(mean)
    u = x / lengths[:, None]
    along = u @ mean
    across = u - along[:, None] * mean
    sines = np.linalg.norm(across, axis=1)
    gradient = (w * np.arctan2(sines, along) / sines) @ across
    assert np.linalg.norm(gradient) < 1e-9


def test_slerp_has_no_direction_for_zeros_and_opposites() -> None:
    assert spherical_weights([[0.0, 0.0], [0.0, 1.0]], [0.5, 0.5]) is None
    assert spherical_weights([[1.0, -1.0], [-1.0, 1.0]], [0.5, 0.5]) is None


def test_slerp_averages_linearly_where_there_is_no_direction() -> None:
    recipe = Recipe("slerp", (0.25, 0.75))
    sources = [torch.zeros(4), torch.ones(4)]
    assert products(recipe, lambda: iter([sources])) == [0.25, 0.75]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 400), st.floats(0.001, 1), st.integers(0, 99), st.booleans())
def test_the_threshold_is_the_exact_kth_largest_change(size, density, seed, repeated) -> None:
    base, expert = models(1, size, seed, torch.bfloat16 if repeated else torch.float32)
    cut = size // 3
    found = thresholds(
        Recipe("ties", (1.0,), 1.0, density),
        lambda: iter([[base[:cut], expert[:cut]], [base[cut:], expert[cut:]]]),
    )
    keep = max(1, min(size, round(density * size)))
    delta = (expert.float() - base.float()).abs()
    assert found == [delta.sort(descending=True).values[keep - 1].item()]
