"""A digest that tells two checkpoints apart without reading them whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from megatron_mergemix.checkpoint.index import CheckpointIndex
from megatron_mergemix.checkpoint.metadata import read_index
from megatron_mergemix.errors import CheckpointError

BLOCK_BYTES = 64 * 1024
BLOCKS_PER_FILE = 8


def fingerprint(index: CheckpointIndex) -> str:
    """Return a sampled content digest of a checkpoint: 64 hexadecimal digits.

    It covers every entry's name, shape, dtype and place, and of every data file the length and
    ``BLOCKS_PER_FILE`` evenly spaced blocks of ``BLOCK_BYTES``, the first and the last included.
    Retrained weights change it. A change of single bytes between the blocks of a large file
    does not: it is no proof of integrity. Folder, file times and save ids do not enter.

    Raises:
        CheckpointError: a data file is missing.
    """
    digest = hashlib.sha256()
    files = set()
    for name, tensor in sorted(index.tensors.items()):
        digest.update(repr((name, tensor.shape, tensor.dtype)).encode())
        for chunk in sorted(tensor.chunks, key=lambda chunk: chunk.offsets):
            place = (chunk.offsets, chunk.sizes, chunk.file, chunk.file_offset, chunk.length)
            digest.update(repr(place).encode())
            files.add(chunk.file)
    for name, entry in sorted(index.bytes_entries.items()):
        digest.update(repr((name, entry.file, entry.file_offset, entry.length)).encode())
        files.add(entry.file)
    for file in sorted(files):
        for block in _sample(index.path / file):
            digest.update(block)
    return digest.hexdigest()


def fingerprint_of(folder: Path) -> str:
    """Return the fingerprint of the save in ``folder``, computed once per process.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        stat = (folder / ".metadata").stat()
    except OSError as error:
        raise CheckpointError(f"{folder}/.metadata cannot be read: {error.strerror}.") from error
    return _fingerprint_once(folder, stat.st_mtime_ns, stat.st_ino)


@cache
def _fingerprint_once(folder: Path, mtime: int, inode: int) -> str:
    return fingerprint(read_index(folder))


def _sample(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            length = path.stat().st_size
            yield repr((path.name, length)).encode()
            if length <= BLOCKS_PER_FILE * BLOCK_BYTES:
                yield file.read()
                return
            last = length - BLOCK_BYTES
            for block in range(BLOCKS_PER_FILE):
                file.seek(last * block // (BLOCKS_PER_FILE - 1))
                yield file.read(BLOCK_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
