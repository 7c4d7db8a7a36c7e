"""Fixed windows over held-out datasets: what is measured, before any model is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mergemix.config import LossTask
from megatron_mergemix.data.indexed import IndexedDataset, bytes_per_token
from megatron_mergemix.errors import DataError


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


def cut_windows(
    datasets: Sequence[IndexedDataset], num_windows: int, seq_length: int
) -> np.ndarray:
    """Return int64 windows ``[N, seq_length + 1]`` spread evenly over the datasets' tokens.

    Windows do not overlap. Each dataset gets its share of the windows by tokens.

    Raises:
        DataError: there are fewer tokens than the windows need.
    """
    available = [(dataset.num_tokens - 1) // seq_length for dataset in datasets]
    if sum(available) < num_windows:
        names = ", ".join(str(dataset.prefix) for dataset in datasets)
        raise DataError(
            f"{names}: {num_windows} held-out windows of {seq_length} tokens are asked for, but "
            f"the data has only {sum(available)}. Lower `sequences` or hold out more data."
        )
    # Even steps through all windows of all datasets, as if they were one.
    chosen = (np.arange(num_windows) * sum(available)) // num_windows
    windows = []
    first = 0
    for dataset, count in zip(datasets, available, strict=True):
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
