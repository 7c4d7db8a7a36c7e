"""Compare storages with their CRC-32, where one may hold many tensors.

Megatron's distributed optimizer keeps all parameters in a few buffers, and a legacy checkpoint
stores each buffer once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from isal.isal_zlib import crc32

from megatron_mergemix.checkpoint.archive import Storage
from megatron_mergemix.checkpoint.crc import combine
from megatron_mergemix.checkpoint.index import CheckpointIndex
from megatron_mergemix.errors import CheckpointError

BLOCK = 1 << 22
"""Bytes that are read in one go."""

Piece = tuple[int, int, int]
"""First byte in the storage, length, CRC-32."""


@dataclass
class StorageCheck:
    """A storage in a file, and what is known of its bytes.

    Attributes:
        path: of the file.
        storage: where in the file, and its CRC-32.
        names: of the tensors in it.
        pieces: that were read already.
    """

    path: Path
    storage: Storage
    names: list[str] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)

    def run(self) -> None:
        """Compare the bytes with the CRC-32, reading those that no piece holds.

        Raises:
            CheckpointError: they have changed since they were written.
        """
        begin, length, expected = self.storage
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                crc = _crc(descriptor, begin, length, self.pieces)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}.") from error
        if crc != expected:
            more = f" and {len(self.names) - 1} more" if len(self.names) > 1 else ""
            raise CheckpointError(
                f"{self.path}: the bytes of {self.names[0]}{more} have changed since they were "
                f"written (CRC-32 {crc:08x}, expected {expected:08x}). Copy the checkpoint again "
                "or name another save."
            )


def storage_checks(
    index: CheckpointIndex, names: Iterable[str], seen: Mapping[tuple[str, int], Sequence[Piece]]
) -> list[StorageCheck]:
    """Return the storages that tensors of known places lie in.

    Args:
        index: of a legacy checkpoint.
        names: the tensors.
        seen: what a reader saw of them; see :class:`~.reader.CheckpointReader`.
    """
    checks: dict[tuple[str, Storage], StorageCheck] = {}
    for name in names:
        (chunk,) = index.tensors[name].chunks
        stored = index.stored.get((chunk.file, chunk.file_offset))
        if stored is None or 0 in chunk.sizes:
            continue
        new = StorageCheck(index.path / chunk.file, stored.storage)
        check = checks.setdefault((chunk.file, stored.storage), new)
        check.names.append(name)
        check.pieces += seen.get((name, 0), [])
    return list(checks.values())


def _crc(descriptor: int, begin: int, length: int, pieces: Iterable[Piece]) -> int:
    crc, end = 0, 0
    for first, size, piece in sorted(set(pieces)):
        if first < end:  # tensors that overlap; what was seen of the first is enough
            continue
        crc = _read_on(descriptor, begin, end, first, crc)
        crc = combine(crc, piece, size)
        end = first + size
    return _read_on(descriptor, begin, end, length, crc)


def _read_on(descriptor: int, begin: int, start: int, stop: int, crc: int) -> int:
    while start < stop:
        block = os.pread(descriptor, min(BLOCK, stop - start), begin + start)
        if not block:
            raise OSError(0, "the file ends too early")
        crc = crc32(block, crc)
        start += len(block)
    return crc
