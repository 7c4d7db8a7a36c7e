"""Read any region of a tensor, whatever chunks it was saved in."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from isal.isal_zlib import crc32
from torch import Tensor

from megatron_mergemix.checkpoint.archive import DamagedArchiveError, StoredTensor, stored_tensor
from megatron_mergemix.checkpoint.crc import of_pieces
from megatron_mergemix.checkpoint.index import CheckpointIndex, Chunk, TensorEntry
from megatron_mergemix.checkpoint.tiling import NotTiledError, Tiling
from megatron_mergemix.errors import CheckpointError

CRC_BLOCK = 1 << 22
"""Bytes that are read in one go when only their CRC-32 is wanted."""


class CheckpointReader:
    """Reads regions of one checkpoint's tensors straight from its files.

    Of each chunk the bytes from the region's first to its last element are read: straight into
    the result where they lie there in the same order, else through a buffer of that size.
    Nothing is kept but where chunks and their elements lie; threads may share a reader.

    Attributes:
        index: of the checkpoint.
        seen: with ``check_crc``, what was read in the order of the files: (tensor, number of the
            chunk) -> (first byte, length, CRC-32) within the elements of the chunk.
    """

    def __init__(self, index: CheckpointIndex, check_crc: bool = False) -> None:
        self.index = index
        self.seen: dict[tuple[str, int], list[tuple[int, int, int]]] = {}
        self._check_crc = check_crc
        self._tilings: dict[str, Tiling] = {}
        self._stored: dict[tuple[str, int], StoredTensor] = dict(index.stored)

    def read(
        self,
        name: str,
        offsets: Sequence[int] | None = None,
        sizes: Sequence[int] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return a region of a tensor, on the CPU, in its stored dtype.

        Args:
            name: a tensor of the checkpoint.
            offsets: where the region begins, one number per dim; default: the origin.
            sizes: how far it reaches; default: to the end of every dim.
            out: filled and returned if given: a CPU tensor of the region's shape and stored
                dtype, any strides.

        Raises:
            CheckpointError: no such tensor, or its file is missing, short or damaged.
            ValueError: the region does not lie within the tensor, or ``out`` does not fit it.
        """
        entry = self.index.tensors.get(name)
        if entry is None:
            raise CheckpointError(f"Checkpoint {self.index.path} has no tensor {name}.")
        begin = tuple(offsets) if offsets is not None else (0,) * len(entry.shape)
        if sizes is None:
            sizes = [size - start for size, start in zip(entry.shape, begin, strict=True)]
        region = torch.Size(sizes)
        _check_region(name, entry, begin, region)
        dtype = getattr(torch, entry.dtype)
        if out is None:
            out = torch.empty(region, dtype=dtype, device="cpu")
        elif out.shape != region or out.dtype != dtype or out.device.type != "cpu":
            raise ValueError(f"out does not fit a region {tuple(region)} of {entry.dtype} on CPU")
        if region.numel() > 0:
            for number in self._tiling(name, entry).touched(begin, region):
                self._read_part(name, entry, number, begin, out)
        return out

    def check_crcs(self, name: str) -> None:
        """Check the CRC-32 of every chunk of a tensor, reading what was not ``seen``.

        Raises:
            CheckpointError: names the file and the tensor whose bytes changed after the save.
        """
        entry = self.index.tensors[name]
        for number, chunk in enumerate(entry.chunks):
            path = self.index.path / chunk.file
            with _Opened(path) as descriptor:
                stored = self._locate(descriptor, name, entry, number)
                begin, length, expected = stored.storage
                crc = of_pieces(self.seen.get((name, number), []), length)
                if crc is None:
                    crc = _crc(descriptor, begin, length, path)
            if crc != expected:
                raise CheckpointError(
                    f"{path}: the bytes of {name} at {chunk.offsets} have changed since they were "
                    f"written (CRC-32 {crc:08x}, expected {expected:08x}). Copy the checkpoint "
                    "again or name another save."
                )

    def files(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> list[str]:
        """Return the names of the files that a region of a tensor lies in."""
        entry = self.index.tensors[name]
        touched = self._tiling(name, entry).touched(offsets, sizes)
        return sorted({entry.chunks[number].file for number in touched})

    def read_bytes(self, name: str) -> bytes:
        """Return an opaque entry as it was stored.

        Raises:
            CheckpointError: no such entry, or its file is missing or short.
        """
        entry = self.index.bytes_entries.get(name)
        if entry is None:
            raise CheckpointError(f"Checkpoint {self.index.path} has no entry {name}.")
        data = bytearray(entry.length)
        path = self.index.path / entry.file
        with _Opened(path) as descriptor:
            _fill(memoryview(data), descriptor, entry.file_offset, path)
        return bytes(data)

    def _tiling(self, name: str, entry: TensorEntry) -> Tiling:
        tiling = self._tilings.get(name)
        if tiling is None:
            try:
                tiling = Tiling([(c.offsets, c.sizes) for c in entry.chunks], entry.shape)
            except NotTiledError:
                raise CheckpointError(
                    f"The chunks of {name} in {self.index.path} do not tile {entry.shape}."
                ) from None
            self._tilings[name] = tiling
        return tiling

    def _read_part(
        self, name: str, entry: TensorEntry, number: int, begin: tuple[int, ...], out: Tensor
    ) -> None:
        """Fill the part of ``out``, a region that begins at ``begin``, that lies in a chunk."""
        chunk = entry.chunks[number]
        path = self.index.path / chunk.file
        with _Opened(path) as descriptor:
            stored = self._locate(descriptor, name, entry, number)
            inner, outer, sizes = _overlap(chunk, begin, out.shape)
            part = out
            if sizes != list(out.shape):
                for dim, (start, size) in enumerate(zip(outer, sizes, strict=True)):
                    part = part.narrow(dim, start, size)
            position, data = _read_box(descriptor, stored, inner, part, path)
        if self._check_crc and data is not None:
            piece = (position - stored.storage[0], len(data), crc32(data))
            self.seen.setdefault((name, number), []).append(piece)

    def _locate(self, descriptor: int, name: str, entry: TensorEntry, number: int) -> StoredTensor:
        chunk = entry.chunks[number]
        stored = self._stored.get((chunk.file, chunk.file_offset))
        if stored is not None:
            return stored
        path = self.index.path / chunk.file
        try:
            stored = stored_tensor(descriptor, chunk.file_offset, chunk.length)
        except DamagedArchiveError as error:
            raise CheckpointError(
                f"{path}, bytes {chunk.file_offset} to {chunk.file_offset + chunk.length} "
                f"({name}): {error}. Copy the checkpoint again or name another save."
            ) from error
        if (stored.dtype, stored.sizes) != (entry.dtype, chunk.sizes):
            raise CheckpointError(
                f"{path} holds {stored.dtype} {stored.sizes} where the metadata says "
                f"{entry.dtype} {chunk.sizes} ({name}). The files are of different saves."
            )
        self._stored[chunk.file, chunk.file_offset] = stored
        return stored


def _check_region(
    name: str, entry: TensorEntry, begin: Sequence[int], sizes: Sequence[int]
) -> None:
    fits = len(begin) == len(sizes) == len(entry.shape) and all(
        min(start, size) >= 0 and start + size <= whole
        for start, size, whole in zip(begin, sizes, entry.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{tuple(begin)} + {tuple(sizes)} is not in {name} {entry.shape}")


def _overlap(
    chunk: Chunk, begin: Sequence[int], sizes: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """Return where the overlap begins in the chunk, where in the region, and its sizes."""
    inner, outer, shape = [], [], []
    for offset, length, start, size in zip(chunk.offsets, chunk.sizes, begin, sizes, strict=True):
        low, high = max(offset, start), min(offset + length, start + size)
        inner.append(low - offset)
        outer.append(low - start)
        shape.append(high - low)
    return inner, outer, shape


def _read_box(
    descriptor: int, stored: StoredTensor, offsets: Sequence[int], out: Tensor, path: Path
) -> tuple[int, memoryview | None]:
    """Fill ``out`` from the box of a stored tensor that begins at ``offsets``.

    Return where in the file it begins and, if ``out`` stands there byte for byte, its bytes.
    """
    steps = list(zip(offsets, out.shape, stored.strides, strict=True))
    first = sum(offset * stride for offset, _, stride in steps)
    span = 1 + sum((size - 1) * stride for _, size, stride in steps)
    position = stored.position + first * out.element_size()
    in_order = out.is_contiguous() and all(
        size == 1 or stride == wanted
        for (_, size, stride), wanted in zip(steps, out.stride(), strict=True)
    )
    if in_order:
        data = _bytes(out)
        _fill(data, descriptor, position, path)
        return position, data
    buffer = torch.empty(span, dtype=out.dtype, device="cpu")
    _fill(_bytes(buffer), descriptor, position, path)
    out.copy_(buffer.as_strided(out.shape, stored.strides))
    return position, None


def _crc(descriptor: int, begin: int, length: int, path: Path) -> int:
    crc, buffer = 0, memoryview(bytearray(min(length, CRC_BLOCK)))
    for start in range(0, length, CRC_BLOCK):
        block = buffer[: min(CRC_BLOCK, length - start)]
        _fill(block, descriptor, begin + start, path)
        crc = crc32(block, crc)
    return crc


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def _fill(buffer: memoryview, descriptor: int, position: int, path: Path) -> None:
    """Read until ``buffer`` is full; one call reads at most 2 GiB on Linux."""
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done:]], position + done)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
        if count == 0:
            raise CheckpointError(
                f"{path} ends at byte {position + done}, expected at least "
                f"{position + len(buffer)}. Copy the checkpoint again or name another save."
            )
        done += count


class _Opened:
    """A file descriptor for reading, as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> int:
        try:
            self.descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}.") from error
        return self.descriptor

    def __exit__(self, *exc_info: object) -> None:
        os.close(self.descriptor)
