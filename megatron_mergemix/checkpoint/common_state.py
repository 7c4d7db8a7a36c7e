"""The part of a checkpoint that is not tensors: arguments, iteration, how it was sharded.

Megatron Core up to 0.18 keeps it in ``common.pt``, later ones in an entry of its own. It is read
as inert symbols (see :mod:`.inert_pickle`); of what it names, only what Megatron itself loads
with ``weights_only`` is ever written again.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_mergemix.checkpoint.archive import DamagedArchiveError, stored_pickle
from megatron_mergemix.checkpoint.archive_writer import object_archive
from megatron_mergemix.checkpoint.index import DTYPE_BYTES, CheckpointIndex
from megatron_mergemix.checkpoint.inert_pickle import Global, Inert, RefusedPickle, load_symbols
from megatron_mergemix.checkpoint.pickle_writer import dumps
from megatron_mergemix.errors import CheckpointError

FILE = "common.pt"
ENTRY = "common_state/shard_0_1"

Layout = Literal["common.pt", "common_state"]
"""``common.pt`` is read by Megatron Core 0.16 to main, ``common_state`` from 0.19 on."""

SAFE = {
    "argparse Namespace",
    "types SimpleNamespace",
    "pathlib PosixPath",
    "signal Signals",
    "torch Size",
    "collections OrderedDict",
    "megatron.core.enums ModelType",
    "megatron.core.transformer.enums AttnBackend",
    "megatron.core.transformer.enums CudaGraphScope",
    *(f"torch {dtype}" for dtype in DTYPE_BYTES),
}
"""What arguments consist of and every supported Megatron loads."""

SAFE_SINCE_0_19 = {
    "megatron.core.transformer.enums CudaGraphModule",
    "megatron.core.transformer.enums InferenceCudaGraphScope",
}
"""What older versions refuse; arguments with such a value are left out of ``common.pt``."""

KEPT = ("args", "checkpoint_version", "content_metadata", "mergemix_model")
"""Entries that describe the model. Optimizer, scheduler and counters describe a training run.

``mergemix_model`` tells the architecture of what we trained, which has no Megatron-LM arguments.
"""

NOT_TRAINED = {
    "iteration": 0,
    "consumed_train_samples": 0,
    "consumed_valid_samples": 0,
    "skipped_train_samples": 0,
    "no_save_optim": True,
    "no_save_rng": True,
}
"""Arguments of a merged checkpoint, where the base has them: no training, no optimizer state."""


def read_common(index: CheckpointIndex) -> dict[str, Any]:
    """Return the common state as plain values and symbols; empty where there is none.

    Raises:
        CheckpointError: it is damaged or not a dictionary.
    """
    entry = index.bytes_entries.get(ENTRY)
    path = index.path / (FILE if entry is None else entry.file)
    if entry is None and not path.exists():
        return {}
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            start = 0 if entry is None else entry.file_offset
            length = os.fstat(descriptor).st_size if entry is None else entry.length
            state = load_symbols(stored_pickle(descriptor, start, length))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except (DamagedArchiveError, RefusedPickle) as error:
        raise CheckpointError(
            f"{path}: the common state is damaged: {error}. Copy the checkpoint again."
        ) from error
    if entry is not None and isinstance(state, list) and len(state) == 1:
        state = state[0]
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: the common state is not a dictionary.")
    return state


def arguments(common: Mapping[str, Any]) -> dict[str, Any]:
    """Return Megatron's arguments by name, symbols included; empty where there are none."""
    args = common.get("args")
    if not isinstance(args, Inert) or args.kind != "argparse Namespace":
        return {}
    return dict(args.state) if isinstance(args.state, dict) else {}


def merged_common(index: CheckpointIndex, provenance: object, layout: Layout) -> dict[str, Any]:
    """Return the common state of a checkpoint that is merged onto the base ``index``.

    ``KEPT`` of the base with ``NOT_TRAINED``, iteration 0, and ``mergemix``: the provenance.

    Raises:
        CheckpointError: the base's is damaged or names what Megatron would not load.
    """
    common = read_common(index)
    kept = {key: common[key] for key in KEPT if key in common}
    return untrained(kept, index.path, SAFE | SAFE_SINCE_0_19, provenance, layout)


def untrained(
    kept: dict[str, Any], where: Path, safe: Collection[str], provenance: object, layout: Layout
) -> dict[str, Any]:
    """Return ``kept`` as of a run that has not begun, with ``mergemix``: the provenance.

    Raises:
        CheckpointError: it names a global that is not in ``safe``.
    """
    for name in (name for value in kept.values() for name in _globals(value)):
        if name not in safe:
            raise CheckpointError(
                f"The common state of {where} names {name.replace(' ', '.')!r}, which is not "
                "among the classes that Megatron's arguments consist of. Nothing was executed; "
                "take the checkpoint from its source again."
            )
    args = arguments(kept)
    if args:
        if layout == "common.pt":
            args = {k: v for k, v in args.items() if not SAFE_SINCE_0_19 & set(_globals(v))}
        args.update({key: value for key, value in NOT_TRAINED.items() if key in args})
        kept["args"] = Inert("argparse Namespace", args)
    return {**kept, "iteration": 0, "mergemix": provenance}


def common_archive(common: Mapping[str, Any], layout: Layout) -> bytes:
    """Return the bytes of ``common.pt``, or of the entry ``ENTRY``."""
    return object_archive(dumps(dict(common) if layout == "common.pt" else [dict(common)]))


def _globals(value: Any) -> Iterator[str]:
    """Yield every global that a value names."""
    todo, entered = [value], set()
    while todo:
        value = todo.pop()
        if id(value) in entered:
            continue
        entered.add(id(value))
        if isinstance(value, Global):
            yield " ".join(value.name)
        elif isinstance(value, Inert):
            yield value.kind
            todo += [value.state, *value.args, value.items]
        elif isinstance(value, dict):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple)):
            todo += value
