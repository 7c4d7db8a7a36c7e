"""Read what a ``torch_dist`` checkpoint contains from its ``.metadata``.

That file is a pickle. It is read without torch, without importing anything and without
executing anything (see :mod:`.inert_pickle`), and every number in it is checked before it is
believed. Tensor data is not touched here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_mergemix.checkpoint.index import (
    DTYPE_BYTES,
    BytesEntry,
    CheckpointIndex,
    Chunk,
    TensorEntry,
    is_model_entry,
)
from megatron_mergemix.checkpoint.inert_pickle import Global, GlobalName, Inert, RefusedPickle, load
from megatron_mergemix.checkpoint.tiling import NotTiledError, Tiling
from megatron_mergemix.errors import CheckpointError

MAX_METADATA_BYTES = 1 << 30
"""A larger ``.metadata`` is refused: a thousand ranks write some hundred megabytes."""


def read_index(folder: Path) -> CheckpointIndex:
    """Return the index of the checkpoint in ``folder``, one iteration's folder.

    Raises:
        CheckpointError: ``.metadata`` is missing, damaged, would execute code, contradicts
            itself, or describes something that Megatron's ``torch_dist`` does not write.
    """
    metadata = _load_metadata(folder)
    try:
        tensors, bytes_entries = _entries(metadata)
    except _Damaged as damage:
        raise CheckpointError(f"{folder / '.metadata'}: {damage}") from None
    found = re.fullmatch(r"iter_(\d+)", folder.name)
    return CheckpointIndex(folder, int(found[1]) if found else None, tensors, bytes_entries)


def entry_names(folder: Path) -> list[str]:
    """Return the names in ``folder/.metadata``, whatever format wrote it.

    Raises:
        CheckpointError: as :func:`read_index`.
    """
    try:
        return list(_state_dict(_load_metadata(folder)))
    except _Damaged as damage:
        raise CheckpointError(f"{folder / '.metadata'}: {damage}") from None


# ---- the pickle's vocabulary ----


class _Damaged(Exception):
    """The metadata contradicts itself or is not what it should be."""


def _size(numbers: tuple[int, ...] = ()) -> tuple[int, ...]:
    return tuple(numbers)


def _layout(name: str) -> str:
    return name


def _path(*parts: str) -> str:
    return "/".join(parts)


def _class(kind: str) -> Any:
    return lambda *args: Inert(kind, args or None)


def _member(enum: object, name: object) -> Inert:
    """Return a member of an enum as Python 3.11.0 to 3.11.3 pickles it: ``getattr(Enum, "NAME")``.

    Nothing else may be reached that way.
    """
    if type(enum) is not Global or enum.name not in _ENUMS or type(name) is not str:
        raise RefusedPickle(f"refused: taking {name!r} of {enum!r} would execute code")
    return Inert(enum.name[1], (name,))


_DCP = "torch.distributed.checkpoint"
_MCORE = "megatron.core.dist_checkpointing.strategies.torch"
_CLASSES: dict[str, tuple[str, ...]] = {
    f"{_DCP}.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    f"{_DCP}.filesystem": ("_StorageInfo", "_StoragePrefix"),
    # Megatron Core keeps every rank's plan in the metadata, to save time on the next save.
    f"{_DCP}.planner": (
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    ),
    _MCORE: ("MCoreMetadata", "MCoreSavePlan"),  # Megatron Core < 0.16
}
_ENUMS: set[GlobalName] = {
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_DCP}.planner", "WriteItemType"),
}
_VALUES: dict[GlobalName, object] = {("torch", dtype): dtype for dtype in DTYPE_BYTES}
_BUILDERS: dict[GlobalName, Any] = {
    ("torch", "Size"): _size,
    ("torch.serialization", "_get_layout"): _layout,
    ("collections", "OrderedDict"): dict,
    ("builtins", "getattr"): _member,
    ("__builtin__", "getattr"): _member,  # in pickles of protocol 2
    **{
        (module, name): _path
        for module in ("pathlib", "pathlib._local")  # Python 3.13 has the second
        for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    },
    **{(module, kind): _class(kind) for module, kinds in _CLASSES.items() for kind in kinds},
}


def _load_metadata(folder: Path) -> object:
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_METADATA_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    if len(data) > MAX_METADATA_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_METADATA_BYTES} bytes; is it metadata?")
    try:
        return load(data, _VALUES, _BUILDERS)
    except RefusedPickle as error:
        raise CheckpointError(f"{path}: {error}. Take the checkpoint from its source again.") from (
            error
        )


# ---- from inert objects to the index ----

_Place = tuple[str, int, int]


def _entries(metadata: object) -> tuple[dict[str, TensorEntry], dict[str, BytesEntry]]:
    state_dict = _state_dict(metadata)
    places = _places(metadata)
    num_chunks = sum(len(_chunk_list(entry)) for entry in state_dict.values())
    if num_chunks > len(places):
        raise _Damaged(f"{num_chunks} chunks but only {len(places)} places in files")
    tensors: dict[str, TensorEntry] = {}
    bytes_entries: dict[str, BytesEntry] = {}
    for name, entry in state_dict.items():
        if entry.kind == "BytesStorageMetadata":
            bytes_entries[name] = BytesEntry(*_place(places, name, None))
        else:
            tensors[name] = _tensor(name, entry, places)
    declared: set[tuple[str, tuple[int, ...] | None]] = {(name, None) for name in bytes_entries}
    declared |= {(name, c.offsets) for name, tensor in tensors.items() for c in tensor.chunks}
    for name, offsets in places:
        if is_model_entry(name) and (name, offsets) not in declared:
            raise _Damaged(f"{name!r} at {offsets} has a place in a file but is not declared")
    return tensors, bytes_entries


def _state_dict(metadata: object) -> dict[str, Inert]:
    entries = _state(metadata, "Metadata", "MCoreMetadata").get("state_dict_metadata")
    if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries):
        raise _Damaged("state_dict_metadata does not map names to entries")
    for name, entry in entries.items():
        kinds = ("TensorStorageMetadata", "BytesStorageMetadata")
        if not isinstance(entry, Inert) or entry.kind not in kinds:
            raise _Damaged(f"{name!r} is neither a tensor nor bytes")
    return entries


def _places(metadata: object) -> dict[tuple[str, tuple[int, ...] | None], _Place]:
    storage = _state(metadata, "Metadata", "MCoreMetadata").get("storage_data")
    if not isinstance(storage, dict):
        raise _Damaged("storage_data is not a dict")
    places: dict[tuple[str, tuple[int, ...] | None], _Place] = {}
    for index, info in storage.items():
        key, place = _state(index, "MetadataIndex"), _state(info, "_StorageInfo")
        name, offset = key.get("fqn"), key.get("offset")
        if not isinstance(name, str):
            raise _Damaged("an index in storage_data has no name")
        if place.get("transform_descriptors"):
            raise _Damaged(f"{name!r} is stored compressed; Megatron does not write this")
        file = place.get("relative_path")
        # Only a plain name: the checkpoint must not reach out of its own folder.
        if not isinstance(file, str) or file in ("", ".", "..") or set(file) & set("/\\\0"):
            raise _Damaged(f"{name!r} lies in {file!r}, which is not a file name")
        where = (file, _count(place.get("offset")), _count(place.get("length")))
        box = name, None if offset is None else _counts(offset)
        if places.setdefault(box, where) != where:
            raise _Damaged(f"{name!r} at {box[1]} has two places in files")
    return places


def _tensor(name: str, entry: Inert, places: Mapping[Any, _Place]) -> TensorEntry:
    state = _state(entry, "TensorStorageMetadata")
    properties = state.get("properties")
    if not isinstance(properties, Inert) or properties.kind != "TensorProperties":
        raise _Damaged(f"{name!r} has no dtype")
    if not isinstance(properties.state, tuple) or len(properties.state) < 2:
        raise _Damaged(f"{name!r} has no dtype")
    dtype, layout = properties.state[:2]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES or layout != "torch.strided":
        raise _Damaged(f"{name!r} is not a dense tensor of a known dtype")
    shape = _counts(state.get("size"))
    chunks = []
    for chunk in _chunk_list(entry):
        box = _state(chunk, "ChunkStorageMetadata")
        offsets, sizes = _counts(box.get("offsets")), _counts(box.get("sizes"))
        chunks.append(Chunk(offsets, sizes, *_place(places, name, offsets)))
    tensor = TensorEntry(shape, dtype, tuple(chunks))
    if is_model_entry(name):  # optimizers flatten their state in ways of their own
        _check_chunks(name, tensor)
    return tensor


def _check_chunks(name: str, tensor: TensorEntry) -> None:
    for chunk in tensor.chunks:
        if chunk.length < math.prod(chunk.sizes) * DTYPE_BYTES[tensor.dtype]:
            raise _Damaged(
                f"{name!r} has {chunk.length} bytes for {chunk.sizes} elements of {tensor.dtype}"
            )
    try:
        Tiling([(chunk.offsets, chunk.sizes) for chunk in tensor.chunks], tensor.shape)
    except NotTiledError:
        raise _Damaged(
            f"the {len(tensor.chunks)} chunks of {name!r} do not tile its shape {tensor.shape}"
        ) from None


def _place(places: Mapping[Any, _Place], name: str, offsets: tuple[int, ...] | None) -> _Place:
    place = places.get((name, offsets))
    if place is None:
        raise _Damaged(f"{name!r} at {offsets} has no place in a file")
    return place


def _chunk_list(entry: Inert) -> list[Any]:
    if entry.kind == "BytesStorageMetadata":
        return []
    chunks = _state(entry, entry.kind).get("chunks")
    if not isinstance(chunks, list):
        raise _Damaged("a tensor has no list of chunks")
    return chunks


def _state(value: object, *kinds: str) -> dict[Any, Any]:
    if not isinstance(value, Inert) or value.kind not in kinds or type(value.state) is not dict:
        raise _Damaged(f"expected a {kinds[0]}")
    return value.state


def _counts(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > 64:
        raise _Damaged("expected a shape of at most 64 dims")
    return tuple(_count(number) for number in value)


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise _Damaged("expected a count below 2**63")
    return value
