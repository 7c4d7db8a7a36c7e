from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mergemix.checkpoint.tiling import NotTiledError, Tiling


def is_tiled(tiles, shape):
    try:
        Tiling(tiles, shape)
    except NotTiledError:
        return False
    return True


interval = st.tuples(st.integers(0, 3), st.integers(0, 3))


@st.composite
def boxes(draw):
    pairs = draw(st.lists(st.tuples(interval, interval), max_size=5))
    return [((a, b), (m, n)) for (a, m), (b, n) in pairs]


@st.composite
def slabs(draw):
    """A tiling: rows are cut into slabs, and every slab into columns of its own."""
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    result = []
    for top, bottom in itertools.pairwise(_edges(draw, rows)):
        for left, right in itertools.pairwise(_edges(draw, columns)):
            result.append(((top, left), (bottom - top, right - left)))
    return draw(st.permutations(result)), (rows, columns)


def _edges(draw, size):
    return sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=3))})


@given(slabs())
def test_slabs_in_any_order_tile(case):
    tiles, shape = case
    assert is_tiled(tiles, shape)


@given(slabs(), st.data())
def test_a_tiling_without_one_box_or_with_one_twice_does_not_tile(case, data):
    tiles, shape = case
    one = data.draw(st.sampled_from(tiles))
    assert not is_tiled([tile for tile in tiles if tile != one], shape)
    assert not is_tiled([*tiles, one], shape)


@settings(max_examples=300)
@given(boxes(), interval)
def test_what_is_accepted_covers_every_element_exactly_once(tiles, shape):
    counts = np.zeros((8, 8), int)
    for (a, b), (m, n) in tiles:
        counts[a : a + m, b : b + n] += 1
    inside = counts[: shape[0], : shape[1]]
    covered = (inside == 1).all() and counts.sum() == inside.size
    if is_tiled(tiles, shape):
        assert covered


def test_a_scalar_is_tiled_by_exactly_one_box():
    assert is_tiled([((), ())], ())
    assert not is_tiled([], ())
    assert not is_tiled([((), ()), ((), ())], ())


@pytest.mark.parametrize("tiles", [[], [((0, 0), (0, 3))]])
def test_an_empty_tensor_needs_no_box(tiles):
    assert is_tiled(tiles, (0, 3))


def test_empty_boxes_count_for_nothing():
    assert is_tiled([((0,), (4,)), ((4,), (0,))], (4,))


def test_a_box_of_another_rank_does_not_tile():
    assert not is_tiled([((0,), (4,))], (4, 1))


@given(slabs(), st.data())
def test_a_region_touches_exactly_the_boxes_that_share_elements_with_it(case, data):
    tiles, shape = case
    begin = [data.draw(st.integers(0, size - 1)) for size in shape]
    sizes = [data.draw(st.integers(1, s - b)) for s, b in zip(shape, begin, strict=True)]
    shared = {
        number
        for number, (offsets, lengths) in enumerate(tiles)
        if all(
            max(o, b) < min(o + length, b + size)
            for o, length, b, size in zip(offsets, lengths, begin, sizes, strict=True)
        )
    }
    touched = list(Tiling(tiles, shape).touched(begin, sizes))
    assert len(touched) == len(set(touched))
    assert set(touched) == shared


def test_an_empty_tensor_has_no_box_to_touch():
    assert list(Tiling([((0, 0), (0, 3))], (0, 3)).touched((0, 0), (0, 3))) == []


def test_a_full_box_in_an_empty_tensor_does_not_tile():
    assert not is_tiled([((0, 0), (1, 3))], (0, 3))
