"""One rank's ``model_optim_rng.pt``: what it holds, and where its tensors lie.

The file is a ``torch.save`` archive of the rank's arguments, model, optimizer and random state.
Its pickle is read as inert symbols (see :mod:`.inert_pickle`): nothing that it names is imported
or executed, and no element is read.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mergemix.checkpoint.archive import (
    DamagedArchiveError,
    Storage,
    StoredTensor,
    stored_object,
)
from megatron_mergemix.checkpoint.archive_writer import STORAGES
from megatron_mergemix.checkpoint.index import DTYPE_BYTES, is_extra_state
from megatron_mergemix.checkpoint.inert_pickle import Global, Inert, RefusedPickle, load_symbols
from megatron_mergemix.errors import CheckpointError

MODEL_KEY = re.compile(r"model\d*")
"""Entries of the file that hold parameters: one per virtual pipeline stage."""

RUN_KEYS = {
    "args",
    "checkpoint_version",
    "iteration",
    "total_iters",
    "optimizer",
    "opt_param_scheduler",
    "lr_scheduler",
    "num_floating_point_operations_so_far",
    "rerun_state_machine",
    "rng_state",
    "random_rng_state",
    "np_rng_state",
    "torch_rng_state",
    "cuda_rng_state",
    "rng_tracker_states",
}
"""Entries that describe a training run. Tensors are expected in these and in the model."""

MAX_DEPTH = 64
"""More containers in one another than any module or optimizer has."""

_REBUILD = "torch._utils _rebuild_"
_DTYPES = {f"torch {name}": dtype for dtype, name in STORAGES.items()}
_DTYPES |= {"torch ComplexFloatStorage": "complex64", "torch ComplexDoubleStorage": "complex128"}


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor among the symbols of a file.

    Attributes:
        path: keys that lead to it.
        holder: what holds it, so that something else can be put there.
        key: where in the holder.
        stored: where its elements lie.
    """

    path: tuple[str, ...]
    holder: Any
    key: Any
    stored: StoredTensor

    @property
    def is_model(self) -> bool:
        """Whether it is merged: a parameter or a persistent buffer."""
        return _in_model(self.path) and not _in_extra_state(self.path)

    @property
    def is_copied(self) -> bool:
        """Whether it belongs to the opaque state of a module."""
        return _in_model(self.path) and _in_extra_state(self.path)


def read_file(path: Path) -> tuple[dict[str, Any], list[Place]]:
    """Return what one rank saved as plain values and symbols, and its tensors in their order.

    Raises:
        CheckpointError: it cannot be read, is damaged, or holds parameters that are no plain
            tensors, such as quantised ones.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            pickle, storages = stored_object(descriptor, 0, os.fstat(descriptor).st_size)
        finally:
            os.close(descriptor)
        state = load_symbols(pickle)
        if not isinstance(state, dict) or not all(type(key) is str for key in state):
            raise DamagedArchiveError("not a dictionary of names")
        places = list(_places(state, storages))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except (DamagedArchiveError, RefusedPickle) as error:
        raise CheckpointError(
            f"{path}: {error}. Copy the checkpoint again or name another save."
        ) from error
    except _Unmergeable as error:
        raise CheckpointError(f"{path}: {error}") from error
    return state, places


class _Unmergeable(Exception):
    """The file is whole, but holds what cannot be merged."""


def _places(state: dict[str, Any], storages: Mapping[str, Storage]) -> Iterator[Place]:
    todo: list[tuple[tuple[str, ...], Any, Any]] = [((k,), state, k) for k in reversed(state)]
    entered = set()
    while todo:
        path, holder, key = todo.pop()
        value = holder[key]
        in_model = _in_model(path)
        if (stored := _stored(value, path, storages)) is not None:
            if not in_model and path[0] not in RUN_KEYS:
                raise _Unmergeable(
                    f"the entry {path[0]!r} holds tensors, and is known neither as model nor as "
                    "optimizer state; mergemix cannot tell whether it must be merged."
                )
            if in_model and _in_extra_state(path):
                _check_extra_state(holder, path, stored)
            yield Place(path, holder, key, stored)
            continue
        if in_model and not _in_extra_state(path):
            _check_plain(value, path)
        if id(value) in entered:  # shared, or a circle
            continue
        if len(path) > MAX_DEPTH:
            raise DamagedArchiveError(f"nested more than {MAX_DEPTH} deep")
        inside = list(_inside(value, in_model))
        if inside:
            entered.add(id(value))
        for part in reversed(inside):
            keys = part if isinstance(part, dict) else range(len(part))
            todo += [((*path, str(key)), part, key) for key in reversed(keys)]


def _inside(value: Any, in_model: bool) -> Iterator[Any]:
    """Yield the containers that a value consists of."""
    parts: tuple[Any, ...] = (value,)
    if isinstance(value, Inert):
        parts = (value.items,) if in_model else (value.items, value.state, value.args)
    yield from (part for part in parts if isinstance(part, (dict, list, tuple)))


def _in_model(path: tuple[str, ...]) -> bool:
    return MODEL_KEY.fullmatch(path[0]) is not None


def _in_extra_state(path: tuple[str, ...]) -> bool:
    return any(is_extra_state(part) for part in path)


def _check_extra_state(holder: Any, path: tuple[str, ...], stored: StoredTensor) -> None:
    if isinstance(holder, tuple) or stored.dtype != "uint8":
        raise _Unmergeable(
            f"{'.'.join(path)} is a tensor of {stored.dtype} in a {type(holder).__name__}; of the "
            "opaque states of modules only bytes are known."
        )


def _check_plain(value: Any, path: tuple[str, ...]) -> None:
    is_dict = type(value) is dict or (
        isinstance(value, Inert) and value.kind == "collections OrderedDict" and not value.args
    )
    if not is_dict and type(value) not in (type(None), bool, int, float, str):
        kind = value.kind if isinstance(value, Inert) else type(value).__name__
        raise _Unmergeable(
            f"{'.'.join(path)} is a {kind.replace(' ', '.')[:80]} and not a plain tensor: "
            "quantised parameters cannot be merged. Save the checkpoints without them."
        )


def _stored(
    value: Any, path: tuple[str, ...], storages: Mapping[str, Storage]
) -> StoredTensor | None:
    """Return where the elements lie if ``value`` is a tensor."""
    try:
        while isinstance(value, Inert) and value.kind.startswith(f"{_REBUILD}parameter"):
            value = value.args[0]
        if not isinstance(value, Inert) or not value.kind.startswith(f"{_REBUILD}tensor_v"):
            return None
        storage, offset, sizes, strides = value.args[:4]
        kind, key = storage.state[1:3]
        dtype = _DTYPES.get(_name(kind))
        if value.kind.endswith("_v3"):
            dtype = _name(value.args[6]).removeprefix("torch ")
        if dtype not in DTYPE_BYTES:
            raise ValueError("an unknown dtype")
        return _bounded(dtype, offset, sizes, strides, storages[key])
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise DamagedArchiveError(f"{'.'.join(path)} is a damaged tensor ({error})") from error


def _bounded(dtype: str, offset: Any, sizes: Any, strides: Any, storage: Storage) -> StoredTensor:
    for numbers in ((offset,), sizes, strides):
        if type(numbers) is not tuple or len(numbers) > 64:
            raise TypeError("a shape that is none")
        if not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
            raise ValueError("a negative or impossible size")
    begin, length, _ = storage
    reach = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if math.prod(sizes) > 0 and (reach + 1) * DTYPE_BYTES[dtype] > length:
        raise ValueError("fewer elements than its shape has")
    return StoredTensor(dtype, sizes, strides, begin + offset * DTYPE_BYTES[dtype], storage)


def _name(value: Any) -> str:
    return " ".join(value.name) if isinstance(value, Global) else ""
