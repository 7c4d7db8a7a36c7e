"""Write the ``.metadata`` of a ``torch_dist`` checkpoint without importing torch."""

from __future__ import annotations

from megatron_mergemix.checkpoint.index import CheckpointIndex, Chunk, TensorEntry
from megatron_mergemix.checkpoint.inert_pickle import Global, Inert
from megatron_mergemix.checkpoint.metadata import MAX_METADATA_BYTES
from megatron_mergemix.checkpoint.pickle_writer import call, dumps, new

_METADATA = "torch.distributed.checkpoint.metadata"
_FILES = "torch.distributed.checkpoint.filesystem"


def metadata_bytes(index: CheckpointIndex) -> bytes:
    """Return a pickle that torch's ``FileSystemReader`` reads as the content of ``index``.

    Plans of a former save are not part of it: Megatron consults them under
    ``--ckpt-assume-constant-structure``, and they describe other ranks.
    """
    entries: dict[str, Inert] = {}
    places: dict[Inert, Inert] = {}
    for name, tensor in index.tensors.items():
        entries[name] = _tensor(tensor)
        for chunk in tensor.chunks:
            places[_key(name, chunk)] = _place(chunk.file, chunk.file_offset, chunk.length)
    for name, entry in index.bytes_entries.items():
        entries[name] = new(f"{_METADATA} BytesStorageMetadata", {})
        places[_key(name, None)] = _place(entry.file, entry.file_offset, entry.length)
    meta: dict[str, object] = {
        "checkpoint_id": str(index.path),
        "save_id": None,
        "load_id": None,
        "modules": [],
    }
    return dumps(
        new(
            f"{_METADATA} Metadata",
            {
                "state_dict_metadata": entries,
                "planner_data": None,
                "storage_data": places,
                "storage_meta": new(f"{_METADATA} StorageMeta", meta),
                "version": "1.0.0",
            },
        ),
        MAX_METADATA_BYTES,
    )


def _tensor(tensor: TensorEntry) -> Inert:
    properties = (
        Global(("torch", tensor.dtype)),
        call("torch.serialization _get_layout", "torch.strided"),
        False,
        call(f"{_METADATA} _MEM_FORMAT_ENCODING", 0),
        False,
    )
    chunks = [
        new(
            f"{_METADATA} ChunkStorageMetadata",
            {"offsets": _size(chunk.offsets), "sizes": _size(chunk.sizes)},
        )
        for chunk in tensor.chunks
    ]
    return new(
        f"{_METADATA} TensorStorageMetadata",
        {
            "properties": new(f"{_METADATA} TensorProperties", properties),
            "size": _size(tensor.shape),
            "chunks": chunks,
        },
    )


def _key(name: str, chunk: Chunk | None) -> Inert:
    offset = None if chunk is None else _size(chunk.offsets)
    return new(f"{_METADATA} MetadataIndex", {"fqn": name, "offset": offset, "index": None})


def _place(file: str, offset: int, length: int) -> Inert:
    state = {"relative_path": file, "offset": offset, "length": length}
    return new(f"{_FILES} _StorageInfo", state)


def _size(numbers: tuple[int, ...]) -> Inert:
    return call("torch Size", numbers)
