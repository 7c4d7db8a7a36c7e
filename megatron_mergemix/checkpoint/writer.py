"""Write a ``torch_dist`` checkpoint piece by piece, from any number of threads or processes.

Where everything goes is decided beforehand from the base alone: the same files, the same chunks,
without optimizer state. So a piece can be written as soon as it is known, and the result does
not depend on who wrote what when.
"""

from __future__ import annotations

import io
import json
import os
import threading
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_mergemix.checkpoint.archive_writer import TensorArchive
from megatron_mergemix.checkpoint.common_state import (
    ENTRY,
    FILE,
    Layout,
    common_archive,
)
from megatron_mergemix.checkpoint.index import (
    BytesEntry,
    CheckpointIndex,
    Chunk,
    TensorEntry,
    is_model_entry,
)
from megatron_mergemix.checkpoint.metadata_writer import metadata_bytes
from megatron_mergemix.checkpoint.reader import CheckpointReader
from megatron_mergemix.errors import CheckpointError
from megatron_mergemix.files.publishing import sync_folder

CONFIG = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
"""Of ``metadata.json``. Versions up to 0.18 refuse further keys, and later ones need none."""


@dataclass(frozen=True, slots=True)
class OutputChunk:
    """A chunk of the new checkpoint.

    Attributes:
        name: of the tensor.
        archive: what is written.
        chunk: its box and its place.
        elements: first byte of the elements in the file.
    """

    name: str
    archive: TensorArchive
    chunk: Chunk
    elements: int


@dataclass(frozen=True)
class Output:
    """Where everything of a new checkpoint goes.

    Attributes:
        index: of the new checkpoint.
        chunks: file by file, in the order of the files.
        copied: (entry of the base, entry of the new checkpoint), stored as bytes.
        common: bytes of the common state, which are an entry or a file of their own.
        layout: which of the two.
    """

    index: CheckpointIndex
    chunks: Sequence[OutputChunk]
    copied: Sequence[tuple[str, BytesEntry]]
    common: bytes
    layout: Layout


def plan_output(
    base: CheckpointIndex, folder: Path, common: Mapping[str, Any], layout: Layout
) -> Output:
    """Return where the model tensors and the bytes entries of ``base`` go in ``folder``."""
    content = common_archive(common, layout)
    ends: dict[str, int] = defaultdict(int)
    outputs: list[OutputChunk] = []
    copied: list[tuple[str, BytesEntry]] = []
    for name, place in _in_file_order(base):
        position = ends[place.file]
        if isinstance(place, BytesEntry):
            copied.append((name, BytesEntry(place.file, position, place.length)))
            ends[place.file] += place.length
            continue
        archive = TensorArchive(base.tensors[name].dtype, place.sizes)
        before, length = archive.lengths()
        chunk = replace(place, file_offset=position, length=length)
        outputs.append(OutputChunk(name, archive, chunk, position + before))
        ends[place.file] += length
    bytes_entries = dict(copied)
    if layout == "common_state":
        file = min(ends)
        bytes_entries[ENTRY] = BytesEntry(file, ends[file], len(content))
        ends[file] += len(content)
    index = CheckpointIndex(folder, None, _tensors(base, outputs), bytes_entries)
    return Output(index, outputs, copied, content, layout)


def _in_file_order(base: CheckpointIndex) -> list[tuple[str, Chunk | BytesEntry]]:
    places: list[tuple[str, Chunk | BytesEntry]] = [
        (name, chunk) for name, tensor in base.model_tensors().items() for chunk in tensor.chunks
    ]
    places += [(n, entry) for n, entry in base.bytes_entries.items() if is_model_entry(n)]
    return sorted(places, key=lambda place: (place[1].file, place[1].file_offset))


def _tensors(base: CheckpointIndex, outputs: Sequence[OutputChunk]) -> dict[str, TensorEntry]:
    chunks = {(output.name, output.chunk.offsets): output.chunk for output in outputs}
    return {
        name: replace(tensor, chunks=tuple(chunks[name, c.offsets] for c in tensor.chunks))
        for name, tensor in base.model_tensors().items()
    }


MOST_OPEN = 128
"""Files, where more are to be written: a thousand ranks save some thousand, and many machines let a
process have 1024 at a time."""


@dataclass
class _OpenFile:
    descriptor: int
    writers: int = 0


class OpenFiles:
    """The data files of a new checkpoint, open for writing; threads may share them."""

    def __init__(self, output: Output) -> None:
        """Prepare; a file is created when it is first written to."""
        self._folder = output.index.path
        self._written: set[str] = set()
        self._open: dict[str, _OpenFile] = {}  # the one that was used last is the last
        self._lock = threading.Lock()

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._open.values():
            os.close(file.descriptor)

    def write(self, file: str, position: int, data: bytes | memoryview) -> None:
        """Write all of ``data`` at a position.

        Raises:
            OSError: the file system refuses.
        """
        rest, begin = memoryview(data), position
        with self._held(file) as descriptor:
            while rest:
                done = os.pwrite(descriptor, rest, position)
                rest, position = rest[done:], position + done
            # The disk begins at once, and ``sync`` has little left to wait for.
            os.posix_fadvise(descriptor, begin, position - begin, os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        """Wait until everything written so far survives a power failure."""
        for name in sorted(self._written):
            with self._held(name) as descriptor:
                os.fsync(descriptor)  # also of what went through a descriptor that is closed by now

    @contextmanager
    def _held(self, name: str) -> Iterator[int]:
        """Yield a descriptor that stays open within the block."""
        with self._lock:
            file = self._open.pop(name, None) or self._opened(name)
            self._open[name] = file
            file.writers += 1
        try:
            yield file.descriptor
        finally:
            with self._lock:
                file.writers -= 1

    def _opened(self, name: str) -> _OpenFile:
        """Open a file, and close the one that was not used for longest where there are many."""
        if len(self._open) >= MOST_OPEN:
            idle = next((each for each, file in self._open.items() if not file.writers), None)
            if idle is not None:
                os.close(self._open.pop(idle).descriptor)
        self._written.add(name)
        return _OpenFile(os.open(self._folder / name, os.O_WRONLY | os.O_CREAT, 0o644))


def write_frames(output: Output, files: OpenFiles, crcs: Mapping[OutputChunk, int]) -> None:
    """Write what stands around the elements of every chunk, given the CRC-32 of the elements."""
    for chunk in output.chunks:
        before, after = chunk.archive.frame(crcs[chunk])
        files.write(chunk.chunk.file, chunk.elements - len(before), before)
        files.write(chunk.chunk.file, chunk.elements + chunk.archive.num_bytes, after)


def write_entries(
    output: Output, files: OpenFiles, base: CheckpointReader, check_crc: bool
) -> None:
    """Copy the bytes entries of the base, such as ``_extra_state``, without looking inside.

    Raises:
        CheckpointError: with ``check_crc``, an archive has changed since it was written.
    """
    for name, entry in output.copied:
        data = base.read_bytes(name)
        if check_crc and not _is_whole(data):
            where = base.index.path / base.index.bytes_entries[name].file
            raise CheckpointError(
                f"{where}: the bytes of {name} have changed since they were written. Copy the "
                "checkpoint again or name another save."
            )
        files.write(entry.file, entry.file_offset, data)
    if output.layout == "common_state":
        entry = output.index.bytes_entries[ENTRY]
        files.write(entry.file, entry.file_offset, output.common)


def _is_whole(archive: bytes) -> bool:
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as entries:
            return entries.testzip() is None
    except (zipfile.BadZipFile, EOFError, LookupError, NotImplementedError, ValueError):
        return False


def write_rest(output: Output) -> None:
    """Write everything that is not a data file, ``metadata.json`` last, as Megatron does."""
    folder = output.index.path
    if output.layout == "common.pt":
        write_file(folder / FILE, output.common)
    write_file(folder / ".metadata", metadata_bytes(output.index))
    write_file(folder / "metadata.json", json.dumps(CONFIG).encode())
    sync_folder(folder)


def write_file(path: Path, data: bytes) -> None:
    """Write a file of a folder that nobody reads yet, and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
