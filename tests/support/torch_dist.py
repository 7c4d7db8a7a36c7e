"""Write torch_dist checkpoints for tests, in any chunking, without Megatron and without ranks."""

from __future__ import annotations

import io
import itertools
import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor],
    grids: Mapping[str, Sequence[int]] | None = None,
    objects: Mapping[str, bytes] | None = None,
    num_files: int = 2,
) -> Path:
    """Write ``folder`` as Megatron Core would, and return it.

    Args:
        folder: made if missing.
        tensors: name -> global tensor.
        grids: name -> pieces per dim; by default a tensor is one chunk. Pieces may be uneven.
        objects: name -> bytes of an opaque entry.
        num_files: the chunks go round-robin into that many ``.distcp`` files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [io.BytesIO() for _ in range(num_files)]
    turn = itertools.cycle(range(num_files))
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}

    def append(index: MetadataIndex, payload: bytes) -> None:
        number = next(turn)
        offset = files[number].tell()
        files[number].write(payload)
        places[index] = _StorageInfo(f"__{number}_0.distcp", offset, len(payload))

    for name, payload in (objects or {}).items():
        entries[name] = BytesStorageMetadata()
        append(MetadataIndex(name), payload)
    for name, tensor in tensors.items():
        chunks = []
        for offsets, box in boxes(tensor, (grids or {}).get(name, [1] * tensor.dim())):
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), box.shape))
            append(MetadataIndex(name, offsets), saved(box))
        properties = TensorProperties(dtype=tensor.dtype)
        entries[name] = TensorStorageMetadata(properties, tensor.shape, chunks)
    for number, file in enumerate(files):
        (folder / f"__{number}_0.distcp").write_bytes(file.getvalue())
    metadata = Metadata(entries, None, places, StorageMeta(checkpoint_id=str(folder)), "1.0.0")
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(config))
    return folder


def saved(tensor: Tensor) -> bytes:
    """Return the bytes that ``torch.save`` writes for a tensor of its own storage."""
    buffer = io.BytesIO()
    torch.save(tensor.detach().clone(), buffer)
    return buffer.getvalue()


def boxes(tensor: Tensor, grid: Sequence[int]) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Yield (offsets, piece) for every cell of a grid of ``grid[dim]`` pieces per dim."""
    edges = [
        [size * piece // pieces for piece in range(pieces + 1)]
        for size, pieces in zip(tensor.shape, grid, strict=True)
    ]
    for cell in itertools.product(*(itertools.pairwise(edge) for edge in edges)):
        yield tuple(a for a, _ in cell), tensor[tuple(slice(a, b) for a, b in cell)]
