"""A digest that tells two models apart without reading their checkpoints whole."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path

from megatron_mergemix.checkpoint.index import CheckpointIndex, Chunk
from megatron_mergemix.checkpoint.metadata import read_index
from megatron_mergemix.errors import CheckpointError

BLOCK_BYTES = 64 * 1024
NUM_BLOCKS = 256


def fingerprint(index: CheckpointIndex) -> str:
    """Return a sampled content digest of the model in a checkpoint: 64 hexadecimal digits.

    It covers every model tensor's name, shape, dtype and chunks, and of their stored bytes, laid
    end to end, ``NUM_BLOCKS`` evenly spaced blocks of ``BLOCK_BYTES``, the first and the last
    included: all of a small model. Retrained weights change it; the same weights saved again do
    not, whatever optimizer, iteration or save id lie beside them. A change of single bytes between
    the blocks of a large model goes unseen: it is no proof of integrity.

    Raises:
        CheckpointError: a data file is missing or ends too early.
    """
    digest = hashlib.sha256()
    chunks: list[Chunk] = []
    for name, tensor in sorted(index.model_tensors().items()):
        digest.update(repr((name, tensor.shape, tensor.dtype)).encode())
        for chunk in sorted(tensor.chunks, key=lambda chunk: chunk.offsets):
            digest.update(repr((chunk.offsets, chunk.sizes, chunk.length)).encode())
            chunks.append(chunk)
    for chunk, first, count in _sampled(chunks):
        digest.update(_read(index.path / chunk.file, chunk.file_offset + first, count))
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


def _sampled(chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, int, int]]:
    """Yield chunk, first byte within it and number of bytes of everything that is read."""
    ends = list(accumulate(chunk.length for chunk in chunks))
    total = ends[-1] if ends else 0
    if total <= NUM_BLOCKS * BLOCK_BYTES:
        yield from ((chunk, 0, chunk.length) for chunk in chunks)
        return
    for block in range(NUM_BLOCKS):
        position = (total - BLOCK_BYTES) * block // (NUM_BLOCKS - 1)
        stop = position + BLOCK_BYTES
        while position < stop:  # a block may reach over several small chunks
            number = bisect_right(ends, position)
            first = position - (ends[number] - chunks[number].length)
            count = min(stop, ends[number]) - position
            yield chunks[number], first, count
            position += count


def _read(path: Path, start: int, count: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(count)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    if len(data) < count:
        raise CheckpointError(f"{path} is cut off: it ends before byte {start + count}.")
    return data
