"""Where the elements of a tensor lie inside the archive that ``torch.save`` wrote.

``torch.save`` writes a zip archive with the elements uncompressed in one entry and a small
pickle that tells dtype, sizes and strides. Knowing the position of the first element, a reader
takes what it needs straight from the file; ``torch.load`` would read the whole archive, copy it
twice, and reach a tenth of the speed. Nothing is imported or executed (see
:mod:`.inert_pickle`).
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_mergemix.checkpoint.index import DTYPE_BYTES
from megatron_mergemix.checkpoint.inert_pickle import GlobalName, Inert, RefusedPickle, load

MAX_PICKLE_BYTES = 1 << 16
"""The pickle of one tensor takes some hundred bytes."""

MAX_OBJECT_BYTES = 1 << 26
"""The pickle of a checkpoint's arguments takes some ten thousand bytes."""


Storage = tuple[int, int, int]
"""First byte in the file, length in bytes, CRC-32."""


class DamagedArchiveError(Exception):
    """The bytes are not an archive that holds one dense tensor."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        dtype: a key of ``DTYPE_BYTES``.
        sizes: shape.
        strides: in elements, one per dim; not negative.
        position: byte of the first element, counted from the beginning of the file.
        storage: of all elements in the archive, more than this tensor's where it is a view.
    """

    dtype: str
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    position: int
    storage: Storage = (0, 0, 0)


def stored_tensor(descriptor: int, start: int, length: int) -> StoredTensor:
    """Return where the tensor of the archive at ``[start, start + length)`` of a file lies.

    All its elements lie inside the archive.

    Args:
        descriptor: of the file, open for reading; its position is neither used nor moved.
        start: first byte of the archive.
        length: bytes of the archive.

    Raises:
        DamagedArchiveError: the bytes are anything but one archive with one dense tensor.
    """
    with _opened(descriptor, start, length) as archive:
        return _locate(archive, descriptor, start, length)


def stored_pickle(descriptor: int, start: int, length: int) -> bytes:
    """Return the pickle in the archive at ``[start, start + length)`` of a file, unread.

    Raises:
        DamagedArchiveError: the bytes are not a whole archive.
    """
    with _opened(descriptor, start, length) as archive:
        return archive.read(_pickle_entry(archive, MAX_OBJECT_BYTES))


def stored_object(descriptor: int, start: int, length: int) -> tuple[bytes, dict[str, Storage]]:
    """Return an archive's pickle, unread, and where the storages lie that it names by key.

    Args:
        descriptor: of the file, open for reading.
        start: first byte of the archive.
        length: bytes of the archive.

    Raises:
        DamagedArchiveError: the bytes are not a whole archive.
    """
    with _opened(descriptor, start, length) as archive:
        pickled = _pickle_entry(archive, MAX_OBJECT_BYTES)
        root = pickled.filename.removesuffix("data.pkl")
        _check_byte_order(archive, root)
        folder = f"{root}data/"
        storages = {
            entry.filename.removeprefix(folder): _elements(entry, descriptor, start, length)
            for entry in archive.infolist()
            if entry.filename.startswith(folder)
        }
        return archive.read(pickled), storages


@contextlib.contextmanager
def _opened(descriptor: int, start: int, length: int) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(_Window(descriptor, start, length)) as archive:
            yield archive
    except RefusedPickle as error:
        raise DamagedArchiveError(str(error)) from error
    except (zipfile.BadZipFile, EOFError, LookupError, OSError, struct.error) as error:
        raise DamagedArchiveError(f"not a whole archive ({error})") from error
    except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise DamagedArchiveError(f"not a tensor's archive ({error})") from error


def _pickle_entry(archive: zipfile.ZipFile, limit: int) -> zipfile.ZipInfo:
    names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(names) != 1:
        raise ValueError("no data.pkl")
    entry = archive.getinfo(names[0])
    _check_small(entry, limit)
    return entry


def _locate(archive: zipfile.ZipFile, descriptor: int, start: int, length: int) -> StoredTensor:
    pickled = _pickle_entry(archive, MAX_PICKLE_BYTES)
    root = pickled.filename.removesuffix("data.pkl")
    _check_byte_order(archive, root)
    tensor = load(archive.read(pickled), _VALUES, _BUILDERS)
    if not isinstance(tensor, Inert) or tensor.kind != "tensor":
        raise ValueError("another object than a tensor")
    dtype, key, offset, sizes, strides = tensor.state
    storage = _elements(archive.getinfo(f"{root}data/{key}"), descriptor, start, length)
    reach = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if 0 not in sizes and (reach + 1) * DTYPE_BYTES[dtype] > storage[1]:
        raise ValueError("fewer elements than its shape has")
    position = storage[0] + offset * DTYPE_BYTES[dtype]
    return StoredTensor(dtype, sizes, strides, position, storage)


def _check_byte_order(archive: zipfile.ZipFile, root: str) -> None:
    if root + "byteorder" in archive.namelist():  # since torch 2.1
        _check_small(archive.getinfo(root + "byteorder"), MAX_PICKLE_BYTES)
        if archive.read(root + "byteorder") != b"little":
            raise ValueError("not little-endian")


def _elements(entry: zipfile.ZipInfo, descriptor: int, start: int, length: int) -> Storage:
    """Return where the bytes of an entry lie in the file."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError("compressed elements")
    header = os.pread(descriptor, 30, start + entry.header_offset)
    signature, name_length, extra_length = struct.unpack("<4s22xHH", header)
    begin = entry.header_offset + 30 + name_length + extra_length
    if signature != b"PK\3\4" or begin + entry.file_size > length:
        raise ValueError("elements beyond the archive")
    return start + begin, entry.file_size, entry.CRC


def _check_small(entry: zipfile.ZipInfo, limit: int) -> None:
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > limit:
        raise ValueError(f"{entry.filename} is compressed or too long")


class _Window(io.RawIOBase):
    """A part of a file, as a file of its own."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self.descriptor, self.start, self.length = descriptor, start, length
        self.offset = 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self.offset, os.SEEK_END: self.length}[whence]
        if origin + offset < 0:
            raise OSError("seek before the beginning")
        self.offset = origin + offset
        return self.offset

    def read(self, size: int = -1) -> bytes:
        rest = max(0, self.length - self.offset)
        data = os.pread(
            self.descriptor, rest if size < 0 else min(size, rest), self.start + self.offset
        )
        self.offset += len(data)
        return data


# ---- the pickle's vocabulary ----


def _tensor(storage: Any, dtype: Any, offset: Any, sizes: Any, strides: Any) -> Inert:
    key = storage.state[2]
    if dtype not in DTYPE_BYTES or not isinstance(key, str):
        raise ValueError("a storage without dtype or key")
    for numbers in ((offset,), sizes, strides):
        if type(numbers) is not tuple or len(numbers) > 64:
            raise TypeError("a shape that is none")
        if not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
            raise ValueError("a negative or impossible size")
    return Inert("tensor", (dtype, key, offset, sizes, strides))


def _tensor_v2(storage: Any, offset: Any, sizes: Any, strides: Any, *rest: Any) -> Inert:
    return _tensor(storage, storage.state[1], offset, sizes, strides)


def _tensor_v3(
    storage: Any,
    offset: Any,
    sizes: Any,
    strides: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    *rest: Any,
) -> Inert:
    return _tensor(storage, dtype, offset, sizes, strides)


def _parameter(data: object, requires_grad: object, hooks: object) -> object:
    return data


_VALUES: dict[GlobalName, object] = {
    ("torch", "DoubleStorage"): "float64",
    ("torch", "FloatStorage"): "float32",
    ("torch", "BFloat16Storage"): "bfloat16",
    ("torch", "HalfStorage"): "float16",
    ("torch", "LongStorage"): "int64",
    ("torch", "IntStorage"): "int32",
    ("torch", "ShortStorage"): "int16",
    ("torch", "CharStorage"): "int8",
    ("torch", "ByteStorage"): "uint8",
    ("torch", "BoolStorage"): "bool",
    ("torch", "ComplexFloatStorage"): "complex64",
    ("torch", "ComplexDoubleStorage"): "complex128",
    # What has no storage class of its own, such as fp8, comes with its dtype.
    ("torch.storage", "UntypedStorage"): "untyped",
    **{("torch", dtype): dtype for dtype in DTYPE_BYTES},
}
_BUILDERS: dict[GlobalName, Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("collections", "OrderedDict"): dict,
}
