"""Write a legacy ``torch`` checkpoint in the layout of the base, rank file by rank file.

Each file is the base's without optimizer, scheduler and random state, its tensors in the same
order. As with ``torch_dist``, where everything goes is decided beforehand, so pieces can be
written in any order by anyone.
"""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mergemix.checkpoint.archive import StoredTensor
from megatron_mergemix.checkpoint.archive_writer import (
    STORAGES,
    ObjectArchive,
    TensorArchive,
    tensor_symbol,
)
from megatron_mergemix.checkpoint.common_state import KEPT, SAFE, SAFE_SINCE_0_19, untrained
from megatron_mergemix.checkpoint.extra_state import check_extra_state
from megatron_mergemix.checkpoint.index import CheckpointIndex, Chunk, is_extra_state
from megatron_mergemix.checkpoint.inert_pickle import Inert
from megatron_mergemix.checkpoint.legacy import FILE, LegacyIndex, name_of
from megatron_mergemix.checkpoint.legacy_file import MODEL_KEY, Place, read_file
from megatron_mergemix.checkpoint.pickle_writer import PERSISTENT_ID, dumps
from megatron_mergemix.checkpoint.writer import OpenFiles, Output, OutputChunk
from megatron_mergemix.errors import CheckpointError
from megatron_mergemix.files.publishing import sync_folder

SAFE_IN_MODEL = {
    "torch._utils _rebuild_tensor_v2",
    PERSISTENT_ID,
    *(f"torch {name}" for name in STORAGES.values()),
    "_io BytesIO",
    "_codecs encode",
}
"""What tensors and opaque states consist of, and Megatron loads with ``weights_only``."""


@dataclass(frozen=True)
class LegacyOutput(Output):
    """Where everything of a new legacy checkpoint goes; of the files, in the chunks' order.

    Attributes:
        archives: file -> its archive; its storages are the file's chunks.
    """

    archives: Mapping[str, ObjectArchive]


def plan_legacy(base: LegacyIndex, folder: Path, provenance: object) -> LegacyOutput:
    """Return where the model of every rank of ``base`` goes in ``folder``.

    Raises:
        CheckpointError: a file of the base names what Megatron would not load.
    """
    archives: dict[str, ObjectArchive] = {}
    chunks: list[OutputChunk] = []
    for rank in base.ranks:
        path = base.path / rank / FILE
        state, places = read_file(path)
        places = [place for place in places if place.is_model or place.is_copied]
        tensors = [TensorArchive(place.stored.dtype, place.stored.sizes) for place in places]
        content = _content(path, state, places, provenance)
        archive = ObjectArchive(content, tuple(tensor.num_bytes for tensor in tensors))
        file = f"{rank}/{FILE}"
        archives[file] = archive
        for place, tensor, start in zip(places, tensors, archive.starts(), strict=True):
            origin = (0,) * len(tensor.sizes)
            chunk = Chunk(origin, tensor.sizes, file, start, tensor.num_bytes)
            chunks.append(OutputChunk(name_of(rank, place), tensor, chunk, start))
    index = CheckpointIndex(folder, None, {}, {})
    return LegacyOutput(index, chunks, [], b"", "common.pt", archives)


def make_folders(output: LegacyOutput) -> None:
    """Make the ranks' folders, before anything is written."""
    for file in output.archives:
        (output.index.path / file).parent.mkdir(parents=True, exist_ok=True)


def write_legacy_frames(
    output: LegacyOutput, files: OpenFiles, crcs: Mapping[OutputChunk, int]
) -> None:
    """Write what stands around the elements, given the CRC-32 of every chunk."""
    by_file: dict[str, list[int]] = defaultdict(list)
    for chunk in output.chunks:
        by_file[chunk.chunk.file].append(crcs[chunk])
    for file, archive in output.archives.items():
        for position, data in archive.frame(by_file[file]):
            files.write(file, position, data)


def sync_folders(output: LegacyOutput) -> None:
    """Wait until the names of all files survive a power failure."""
    for file in output.archives:
        sync_folder((output.index.path / file).parent)
    sync_folder(output.index.path)


def _content(
    path: Path, state: Mapping[str, Any], places: Sequence[Place], provenance: object
) -> bytes:
    """Return the pickle of a rank's file, in which ``places`` are storages 0, 1, ..."""
    safe = SAFE | SAFE_SINCE_0_19 | SAFE_IN_MODEL
    try:
        _check_extra_states(path, state, places)
        for number, place in enumerate(places):
            tensor = place.stored
            place.holder[place.key] = tensor_symbol(tensor.dtype, tensor.sizes, str(number))
        kept = {k: v for k, v in state.items() if k in KEPT or MODEL_KEY.fullmatch(k)}
        return dumps(untrained(kept, path, safe, provenance, "common.pt"))
    except TypeError as error:
        raise CheckpointError(f"{path} cannot be written anew: {error}.") from error


def _check_extra_states(path: Path, state: Mapping[str, Any], places: Sequence[Place]) -> None:
    """Check that no opaque state of the model would execute code when Megatron loads it.

    Each is put into an archive of its own, as it is in a ``torch_dist`` checkpoint.
    """
    tensors = {(id(place.holder), place.key): place.stored for place in places if place.is_copied}
    for holder, name in _extra_states(state):
        stored, content = tensors.get((id(holder), name)), b""
        if stored is None:
            archive = ObjectArchive(dumps(holder[name]), ())
        else:
            content = _elements(path, stored)
            symbol = tensor_symbol(stored.dtype, stored.sizes, "0")
            archive = ObjectArchive(dumps(symbol), (len(content),))
        frame = [data for _, data in archive.frame([zlib.crc32(content)] * len(archive.lengths))]
        check_extra_state(content.join(frame), f"{path}, {name}")


def _extra_states(state: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield what holds an opaque state that is not None, and its name there."""
    todo = [value for key, value in state.items() if MODEL_KEY.fullmatch(key)]
    entered = set()
    while todo:
        value = todo.pop()
        holder = value.items if isinstance(value, Inert) else value
        if not isinstance(holder, dict) or id(holder) in entered:
            continue
        entered.add(id(holder))
        for key, inside in holder.items():
            if not is_extra_state(str(key)):
                todo.append(inside)
            elif inside is not None:
                yield holder, key


def _elements(path: Path, stored: StoredTensor) -> bytes:
    """Return the bytes of a row-major tensor of bytes."""
    natural = tuple(math.prod(stored.sizes[dim + 1 :]) for dim in range(len(stored.sizes)))
    if 0 not in stored.sizes and stored.strides != natural:
        raise CheckpointError(f"{path}: an opaque state is stored in a form that no module saves.")
    with path.open("rb") as file:
        file.seek(stored.position)
        return file.read(math.prod(stored.sizes))
