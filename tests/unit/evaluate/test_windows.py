"""Held-out windows: where they lie, how they are shared out, and what identifies them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mergemix.config.evaluate import LossTask
from megatron_mergemix.data.indexed import IndexedDataset
from megatron_mergemix.data.sidecar import dump_sidecar, read_sidecar, sidecar_path
from megatron_mergemix.errors import DataError
from megatron_mergemix.evaluate.windows import (
    cut_windows,
    drawn,
    held_out_windows,
    loss_digest,
    loss_windows,
)
from megatron_mergemix.trials import Minibatch
from tests.support.tiny_dataset import write_dataset

BYTE = {"kind": "byte", "path": None, "digest": "0", "vocab_size": 257, "eod": 256}


def dataset(prefix: Path, first: int, count: int, bytes_: int | None = None) -> str:
    """Write tokens ``first, first + 1, ...``, which tell their place, and return the prefix."""
    tokens = np.arange(first, first + count)
    cut = count // 3
    write_dataset(prefix, [tokens[:cut], tokens[cut:]], BYTE if bytes_ is not None else None)
    if bytes_ is not None:
        sidecar = read_sidecar(str(prefix))
        assert sidecar is not None
        sidecar_path(str(prefix)).write_text(
            dump_sidecar(dataclasses.replace(sidecar, bytes=bytes_))
        )
    return str(prefix)


def task(*prefixes: str, sequences: int = 4, metric: str = "loss") -> LossTask:
    return LossTask.model_validate(
        {"prefixes": list(prefixes), "sequences": sequences, "metric": metric}
    )


def test_windows_are_spread_evenly_with_one_token_of_context(tmp_path: Path) -> None:
    windows = cut_windows([IndexedDataset(dataset(tmp_path / "a", 0, 1001))], 4, 10)
    assert windows.dtype == np.int64
    np.testing.assert_array_equal(windows, [np.arange(s, s + 11) for s in (0, 250, 500, 750)])


def test_every_token_can_be_used(tmp_path: Path) -> None:
    data = IndexedDataset(dataset(tmp_path / "a", 0, 41))
    np.testing.assert_array_equal(
        cut_windows([data], 4, 10), [np.arange(s, s + 11) for s in (0, 10, 20, 30)]
    )
    with pytest.raises(DataError, match="4 held-out windows of 10 tokens.* has only 3"):
        cut_windows([IndexedDataset(dataset(tmp_path / "b", 0, 40))], 4, 10)


def test_datasets_share_the_windows_by_their_tokens(tmp_path: Path) -> None:
    small = IndexedDataset(dataset(tmp_path / "a", 0, 1001))
    large = IndexedDataset(dataset(tmp_path / "b", 5000, 3001))
    windows = cut_windows([small, large], 8, 10)
    assert (windows[:, 0] < 5000).sum() == 2
    assert (windows[:, 0] >= 5000).sum() == 6
    # A window never runs from one dataset into the next.
    np.testing.assert_array_equal(windows - windows[:, :1], np.tile(np.arange(11), (8, 1)))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(1, 7), st.data())
def test_windows_of_any_datasets_are_whole_and_apart(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    seq_length: int,
    data: st.DataObject,
) -> None:
    """Also with datasets too short for a single window between longer ones."""
    folder = tmp_path_factory.mktemp("windows")
    datasets = []
    for number, size in enumerate(sizes):
        prefix = folder / str(number)
        write_dataset(prefix, [np.arange(1000 * number, 1000 * number + size)])
        datasets.append(IndexedDataset(str(prefix)))
    most = sum((size - 1) // seq_length for size in sizes)
    if most == 0:
        return
    count = data.draw(st.integers(1, most))
    windows = cut_windows(datasets, count, seq_length)
    assert windows.shape == (count, seq_length + 1)
    np.testing.assert_array_equal(np.diff(windows, axis=1), 1)
    assert (np.diff(windows[:, 0]) >= seq_length).all(), "scored tokens must not repeat"


def test_too_little_data_names_it_and_the_remedy(tmp_path: Path) -> None:
    prefixes = dataset(tmp_path / "a", 0, 30), dataset(tmp_path / "b", 0, 9)
    with pytest.raises(DataError) as caught:
        loss_windows(task(*prefixes, sequences=3), 10)
    message = str(caught.value)
    assert f"{prefixes[0]}, {prefixes[1]}: 3 held-out windows of 10 tokens" in message
    assert "has only 2" in message
    assert "Lower `sequences` or hold out more data" in message


def test_bytes_per_token_are_the_mean_over_all_tokens(tmp_path: Path) -> None:
    a = dataset(tmp_path / "a", 0, 100, bytes_=400)
    b = dataset(tmp_path / "b", 0, 300, bytes_=600)
    windows = loss_windows(task(a, b, metric="bpb"), 10)
    assert windows.bytes_per_token == pytest.approx(1000 / 400)


def test_bpb_without_a_sidecar_is_refused_and_loss_is_not(tmp_path: Path) -> None:
    a, b = dataset(tmp_path / "a", 0, 100, bytes_=400), dataset(tmp_path / "b", 0, 100)
    assert loss_windows(task(a, b), 10).bytes_per_token is None
    with pytest.raises(DataError) as caught:
        loss_windows(task(a, b, metric="bpb"), 10)
    assert f"metric bpb needs the bytes of {b}, but" in str(caught.value)
    assert "metric: loss" in str(caught.value)


def test_the_digest_tells_apart_whatever_changes_a_score(tmp_path: Path) -> None:
    a = dataset(tmp_path / "a", 0, 100, bytes_=400)
    other = dataset(tmp_path / "other", 1, 100, bytes_=400)
    longer = dataset(tmp_path / "longer", 0, 100, bytes_=500)
    digests = [
        loss_digest(task(a), 10),
        loss_digest(task(a), 9),
        loss_digest(task(a, sequences=5), 10),
        loss_digest(task(a, metric="bpb"), 10),
        loss_digest(task(other), 10),
        loss_digest(task(a, other), 10),
        loss_digest(task(other, a), 10),
        loss_digest(task(longer), 10),
    ]
    assert len(set(digests)) == len(digests)


def test_the_digest_knows_no_paths(tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    a = dataset(tmp_path / "a", 0, 100)
    moved = dataset(tmp_path / "moved" / "b", 0, 100)
    assert loss_digest(task(a), 10) == loss_digest(task(moved), 10)
    assert loss_windows(task(a), 10).digest == loss_digest(task(a), 10)


@given(
    num=st.integers(1, 40),
    share=st.floats(0.01, 1.0),
    seed=st.integers(0, 5),
)
def test_minibatches_pass_through_all_windows_before_they_see_one_again(
    num: int, share: float, seed: int
) -> None:
    size = len(drawn(num, Minibatch(0, share, seed, ())))
    assert size == max(1, round(share * num))
    passes = 3
    batches = [drawn(num, Minibatch(n, share, seed, ())) for n in range(-(-passes * num // size))]
    dealt = np.concatenate(batches)[: passes * num].reshape(passes, num)
    assert (np.sort(dealt, axis=1) == np.arange(num)).all()
    if num > 20:
        assert not np.array_equal(dealt[0], dealt[1])
    again = [drawn(num, Minibatch(n, share, seed, ())) for n in range(len(batches))]
    assert all(np.array_equal(*pair) for pair in zip(batches, again, strict=True))


@pytest.mark.parametrize(("sequences", "share"), [(4, 0.2), (4, 0.5), (7, 0.2), (9, 0.5), (3, 0.9)])
def test_held_out_windows_are_none_of_the_search(
    tmp_path: Path, sequences: int, share: float
) -> None:
    """Every token of the dataset is another number, so windows tell where they are from."""
    settings = task(dataset(tmp_path / "a", 0, 101), sequences=sequences)
    searched = loss_windows(settings, 10).tokens
    apart = held_out_windows(settings, 10, share)
    assert apart is not None
    assert not set(apart.tokens[:, 1:].ravel()) & set(searched[:, 1:].ravel())
    assert len(apart.tokens) == min(round(sequences * share / (1 - share)), 10 - sequences)


def test_without_a_share_or_windows_left_nothing_is_held_out(tmp_path: Path) -> None:
    data = dataset(tmp_path / "a", 0, 101)
    assert held_out_windows(task(data, sequences=4), 10, 0.0) is None
    assert held_out_windows(task(data, sequences=10), 10, 0.5) is None
