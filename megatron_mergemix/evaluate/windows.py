"""Fixed windows over held-out datasets: what is measured, before any model is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_mergemix.config.evaluate import LossTask
from megatron_mergemix.data.indexed import IndexedDataset, bytes_per_token
from megatron_mergemix.errors import DataError
from megatron_mergemix.evaluate.first_items import first_to_last
from megatron_mergemix.trials import Minibatch


@dataclass(frozen=True)
class Windows:
    """The held-out windows of one capability.

    Attributes:
        tokens: int64 ``[N, seq_length + 1]``; token 0 of a window is only context.
        bytes_per_token: mean over the datasets, or None where a sidecar is missing.
        digest: identifies metric, windows and data.
    """

    tokens: np.ndarray
    bytes_per_token: float | None
    digest: str


def loss_windows(task: LossTask, seq_length: int) -> Windows:
    """Return the windows of a loss task; every candidate is measured on the same ones.

    Raises:
        DataError: a dataset is missing or too small, or bpb is asked for without its bytes.
    """
    datasets = [IndexedDataset(prefix) for prefix in task.prefixes]
    return Windows(
        cut_windows(datasets, task.sequences, seq_length),
        _mean_bytes_per_token(datasets, task),
        loss_digest(task, seq_length),
    )


def first_ones_first(windows: Windows, share: float, seed: int) -> Windows:
    """Return the windows in an order that begins with the first share of them."""
    order = first_to_last(len(windows.tokens), share, seed)
    return replace(windows, tokens=windows.tokens[order])


def held_out_windows(task: LossTask, seq_length: int, share: float) -> Windows | None:
    """Return windows of the same data that :func:`loss_windows` leaves; None where it leaves none.

    They are spread evenly over what is left, which needs no seed. Fewer than ``share`` asks for
    where there are no more.

    Args:
        task: its ``sequences`` windows are those of the search.
        seq_length: tokens per window.
        share: of the windows of search and held-out part together.

    Raises:
        DataError: as :func:`loss_windows`.
    """
    datasets = [IndexedDataset(prefix) for prefix in task.prefixes]
    total = sum(_available(datasets, seq_length))
    left = np.setdiff1d(np.arange(total), _spread(task.sequences, total))
    count = min(held_out_count(task, share), len(left))
    if count == 0:
        return None
    return Windows(
        _cut(datasets, left[_spread(count, len(left))], seq_length),
        _mean_bytes_per_token(datasets, task),
        f"{count} windows beside those of: {loss_digest(task, seq_length)}",
    )


def held_out_count(task: LossTask, share: float) -> int:
    """Return how many windows are wanted beside ``sequences``, so that they are that share."""
    return round(task.sequences * share / (1.0 - share))


def loss_digest(task: LossTask, seq_length: int) -> str:
    """Return what the scores of a loss task depend on besides the weights, in plain words.

    Raises:
        DataError: a dataset is missing, or bpb is asked for without its bytes.
    """
    datasets = [IndexedDataset(prefix) for prefix in task.prefixes]
    data = " ".join(dataset.fingerprint()[:16] for dataset in datasets)
    ratio = _mean_bytes_per_token(datasets, task)
    text = f"loss, metric {task.metric}, {task.sequences} x {seq_length} tokens of {data}"
    return text if ratio is None else f"{text}, {ratio:.9g} bytes each"


def drawn(num_items: int, minibatch: Minibatch) -> NDArray[np.int64]:
    """Return which of ``num_items`` items are in a minibatch, at least one.

    The items are put one after the other in random orders, a new one for every pass, and cut into
    minibatches: random reshuffling, whose sums have less variance than those of independent draws
    (arXiv 2006.05988).
    """
    size = max(1, round(minibatch.share * num_items))
    places = np.arange(minibatch.number * size, (minibatch.number + 1) * size)
    orders = {
        turn: np.random.default_rng([minibatch.seed, 6, turn]).permutation(num_items)
        for turn in np.unique(places // num_items)
    }
    return np.array([orders[place // num_items][place % num_items] for place in places])


def cut_windows(
    datasets: Sequence[IndexedDataset], num_windows: int, seq_length: int
) -> np.ndarray:
    """Return int64 windows ``[N, seq_length + 1]`` spread evenly over the datasets' tokens.

    Windows do not overlap. Each dataset gets its share of the windows by tokens.

    Raises:
        DataError: there are fewer tokens than the windows need.
    """
    total = sum(_available(datasets, seq_length))
    if total < num_windows:
        names = ", ".join(str(dataset.prefix) for dataset in datasets)
        raise DataError(
            f"{names}: {num_windows} held-out windows of {seq_length} tokens are asked for, but "
            f"the data has only {total}. Lower `sequences` or hold out more data."
        )
    return _cut(datasets, _spread(num_windows, total), seq_length)


def _available(datasets: Sequence[IndexedDataset], seq_length: int) -> list[int]:
    """Return how many windows each dataset has."""
    return [(dataset.num_tokens - 1) // seq_length for dataset in datasets]


def _spread(num: int, total: int) -> NDArray[np.int64]:
    """Return ``num`` of ``total`` numbers in even steps."""
    return np.asarray((np.arange(num) * total) // num)


def _cut(
    datasets: Sequence[IndexedDataset], chosen: NDArray[np.int64], seq_length: int
) -> np.ndarray:
    """Return the chosen windows, numbered through all datasets as if they were one."""
    windows = []
    first = 0
    for dataset, count in zip(datasets, _available(datasets, seq_length), strict=True):
        tokens = dataset.tokens
        for index in chosen[(chosen >= first) & (chosen < first + count)] - first:
            start = int(index) * seq_length
            windows.append(np.asarray(tokens[start : start + seq_length + 1], dtype=np.int64))
        first += count
    return np.stack(windows)


def _mean_bytes_per_token(datasets: Sequence[IndexedDataset], task: LossTask) -> float | None:
    ratios = [bytes_per_token(dataset.prefix) for dataset in datasets]
    if all(ratio is not None for ratio in ratios):
        tokens = [dataset.num_tokens for dataset in datasets]
        return sum(r * t for r, t in zip(ratios, tokens, strict=True) if r) / sum(tokens)
    if task.metric == "bpb":
        missing = [p for p, ratio in zip(task.prefixes, ratios, strict=True) if ratio is None]
        raise DataError(
            f"metric bpb needs the bytes of {', '.join(missing)}, but there is no sidecar "
            "<prefix>.json that tells them. Make the dataset with `mergemix data`, or use "
            "metric: loss."
        )
    return None
