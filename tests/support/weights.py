"""Whole tensors of a checkpoint, read with torch alone."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Return every model tensor of an iteration folder as float64."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # reading without a process group is what we want
        dcp.load(state, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    return {name: tensor.double().numpy() for name, tensor in state.items()}


def assert_same_weights(ours: Path, theirs: Path) -> None:
    """Compare two iteration folders bit for bit."""
    mine, others = read_weights(ours), read_weights(theirs)
    assert mine.keys() == others.keys()
    for name, weight in mine.items():
        np.testing.assert_array_equal(weight, others[name], err_msg=name)
