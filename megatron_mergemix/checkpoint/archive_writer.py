"""Lay out an archive as ``torch.save`` does, so that its elements can be written in any order.

A zip file whose entries are stored uncompressed: the pickle, the byte order, the format's
version and, aligned to 64 bytes, the elements. Everything but the elements and their CRC-32 is
known beforehand.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mergemix.checkpoint.index import DTYPE_BYTES
from megatron_mergemix.checkpoint.inert_pickle import Global, Inert
from megatron_mergemix.checkpoint.pickle_writer import PERSISTENT_ID, call, dumps

ROOT = "archive"
ALIGNMENT = 64
STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "bfloat16": "BFloat16Storage",
    "float16": "HalfStorage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}
"""dtype -> class in ``torch`` that names it in a pickle."""

ZIP64_FROM = 0xFFFFFFFF
"""A size or position from this one on does not fit the fields of a plain zip file."""

MANY_ENTRIES = 0xFFFF
"""From this number of entries on they are counted by zip64."""

_SEE_ZIP64 = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class TensorArchive:
    """The archive of one tensor in row-major order.

    Attributes:
        dtype: a key of ``STORAGES``.
        sizes: shape.
    """

    dtype: str
    sizes: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the elements."""
        return math.prod(self.sizes) * DTYPE_BYTES[self.dtype]

    def frame(self, crc: int) -> tuple[bytes, bytes]:
        """Return what stands before and after the elements; lengths do not depend on ``crc``."""
        pickle = dumps(tensor_symbol(self.dtype, self.sizes, "0"))
        return _frame(_members(pickle), self.num_bytes, crc)

    def lengths(self) -> tuple[int, int]:
        """Return the bytes before the elements and of the whole archive."""
        before, after = self.frame(0)
        return len(before), len(before) + self.num_bytes + len(after)


@dataclass(frozen=True, slots=True)
class ObjectArchive:
    """The archive of an object that refers to storages by the keys ``"0"``, ``"1"``, ...

    Attributes:
        pickle: of the object.
        lengths: bytes of each storage.
    """

    pickle: bytes
    lengths: tuple[int, ...]

    def starts(self) -> list[int]:
        """Return the first byte of each storage."""
        frame = self.frame([0] * len(self.lengths))
        return [position + len(data) for position, data in frame[: len(self.lengths)]]

    def frame(self, crcs: Sequence[int]) -> list[tuple[int, bytes]]:
        """Return (position, bytes) of what stands before each storage and after the last one."""
        before, directory = _entries(_members(self.pickle))
        frame, position = [], 0
        for number, (length, crc) in enumerate(zip(self.lengths, crcs, strict=True)):
            name, header_at = f"data/{number}", position + len(before)
            directory += _directory_entry(name, length, crc, header_at)
            before += _local_header(name, length, crc, header_at)
            frame.append((position, bytes(before)))
            position += len(before) + length
            before = bytearray()
        count, end = len(_members(b"")) + len(self.lengths), position + len(before)
        after = before + directory + _end(count, len(directory), end)
        return [*frame, (position, bytes(after))]


def object_archive(pickle: bytes) -> bytes:
    """Return the archive of an object without tensors, for ``torch.load``."""
    before, after = _frame(_members(pickle), None, 0)
    return before + after


def _members(pickle: bytes) -> list[tuple[str, bytes]]:
    return [("data.pkl", pickle), ("byteorder", b"little"), ("version", b"3\n")]


def tensor_symbol(dtype: str, sizes: tuple[int, ...], key: str) -> Inert:
    """Return a row-major tensor that fills the storage ``key``."""
    strides = tuple(math.prod(sizes[dim + 1 :]) for dim in range(len(sizes)))
    storage = (
        "storage",
        Global(("torch", STORAGES[dtype])),
        key,
        "cpu",
        math.prod(sizes),
    )
    return call(
        "torch._utils _rebuild_tensor_v2",
        Inert(PERSISTENT_ID, storage),
        0,
        sizes,
        strides,
        False,
        call("collections OrderedDict"),
    )


def _frame(
    members: list[tuple[str, bytes]], data_bytes: int | None, data_crc: int
) -> tuple[bytes, bytes]:
    before, directory = _entries(members)
    end = len(before)
    if data_bytes is not None:
        directory += _directory_entry("data/0", data_bytes, data_crc, len(before))
        before += _local_header("data/0", data_bytes, data_crc, len(before))
        end = len(before) + data_bytes
    count = len(members) + (data_bytes is not None)
    return bytes(before), bytes(directory) + _end(count, len(directory), end)


def _entries(members: Sequence[tuple[str, bytes]]) -> tuple[bytearray, bytearray]:
    """Return the first entries of an archive, and their part of the directory."""
    before, directory = bytearray(), bytearray()
    for name, content in members:
        crc = zlib.crc32(content)
        directory += _directory_entry(name, len(content), crc, len(before))
        before += _local_header(name, len(content), crc, len(before)) + content
    return before, directory


def _local_header(name: str, size: int, crc: int, position: int) -> bytes:
    path = f"{ROOT}/{name}".encode()
    extra = struct.pack("<HHQQ", 1, 16, size, size) if size >= ZIP64_FROM else b""
    begin = position + 30 + len(path) + len(extra) + 4
    padding = -begin % ALIGNMENT
    extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
    short = _short(size)
    fields = (
        20 if size < ZIP64_FROM else 45,
        0,
        0,
        0,
        33,
        crc,
        short,
        short,
        len(path),
        len(extra),
    )
    return b"PK\3\4" + struct.pack("<HHHHHIIIHH", *fields) + path + extra


def _directory_entry(name: str, size: int, crc: int, position: int) -> bytes:
    path = f"{ROOT}/{name}".encode()
    wide = [size, size] if size >= ZIP64_FROM else []
    wide += [position] if position >= ZIP64_FROM else []
    extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    version, short = (45 if wide else 20), _short(size)
    fields = (version, version, 0, 0, 0, 33, crc, short, short, len(path), len(extra))
    return (
        b"PK\1\2"
        + struct.pack("<HHHHHHIIIHH", *fields)
        + struct.pack("<HHHII", 0, 0, 0, 0, _short(position))
        + path
        + extra
    )


def _short(number: int) -> int:
    return number if number < ZIP64_FROM else _SEE_ZIP64


def _end(count: int, directory_bytes: int, position: int) -> bytes:
    end = b""
    if position >= ZIP64_FROM or count >= MANY_ENTRIES:
        end = b"PK\6\6" + struct.pack(
            "<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, directory_bytes, position
        )
        end += b"PK\6\7" + struct.pack("<IQI", 0, position + directory_bytes, 1)
    where, short = _short(position), min(count, MANY_ENTRIES)
    return end + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, short, short, directory_bytes, where, 0)
