"""Flat copies of a live model, and their weighted sum written into it in one pass over memory.

In a copy the live tensors of one dtype lie one after the other. Copies are cut into blocks and
interleaved, ``[blocks, copies, block]``, so that a sum reads memory from one place to the next.
Nothing is allocated when a sum is written. A kernel reads every copy once and writes the live
tensors once: on a CPU the compiled one, on as many threads as torch has, on a GPU that of Triton,
on whole copies (one block). Torch sums what neither takes; copies in another memory than the live
tensors pass through buffers beside them.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_mergemix.errors import MergeMixError
from megatron_mergemix.merge import kernel
from megatron_mergemix.merge.linear import block_size, weighted_sum_
from megatron_mergemix.merge.placement import Place

if TYPE_CHECKING:
    from megatron_mergemix.merge import gpu_kernel

_HUGE_PAGE = 1 << 21

SMALLEST_SHARE = 1 << 16
"""Elements below which a second thread is not worth waking."""


def padded(count: int, multiple: int = kernel.STEP) -> int:
    """Return the least multiple that is not below ``count``."""
    return -(-count // multiple) * multiple


def copy_bytes(live: Sequence[Tensor]) -> int:
    """Return the bytes of one flat copy of these tensors."""
    return sum(
        _size([t.numel() for t in live if t.dtype == dtype], dtype) * dtype.itemsize
        for dtype in {tensor.dtype for tensor in live}
    )


def _size(counts: Sequence[int], dtype: torch.dtype) -> int:
    return padded(sum(padded(count) for count in counts), kernel.BLOCKS.get(dtype, kernel.STEP))


@dataclass
class _Group:
    """The live tensors of one dtype: their numbers, where each begins, the copies, what sums."""

    numbers: list[int]
    starts: dict[int, int]
    copies: Tensor
    shares: list[kernel.Outputs]
    on_gpu: gpu_kernel.Outputs | None


class FlatCopies:
    """``num`` copies of the live tensors, and their weighted sums.

    Args:
        live: contiguous float tensors on one device; they keep their storage for good.
        num: of copies.
        place: where they lie.
        folder: for the file, which has no name once it is open: whatever ends the process, the
            disk is free again.
        by_triton: whether Triton's kernel sums copies that lie on the GPU of the live tensors.

    Raises:
        MergeMixError: the folder has no room, or memory cannot be pinned.
    """

    def __init__(
        self,
        live: Sequence[Tensor],
        num: int,
        place: Place,
        folder: Path,
        by_triton: bool = False,
    ) -> None:
        self._live = [tensor.view(-1) for tensor in live]
        self._num = num
        self._by_triton = by_triton and place == "device"
        dtypes = sorted({tensor.dtype for tensor in live}, key=str)
        self._groups = [self._group(dtype, place, folder) for dtype in dtypes]
        self._group_of = {n: group for group in self._groups for n in group.numbers}
        self._threads = ThreadPoolExecutor(torch.get_num_threads())
        self._make_buffers(passing=place != "device" and live[0].device.type != "cpu")

    def _group(self, dtype: torch.dtype, place: Place, folder: Path) -> _Group:
        numbers = [n for n, tensor in enumerate(self._live) if tensor.dtype == dtype]
        counts = [self._live[number].numel() for number in numbers]
        starts, size = {}, 0
        for number, count in zip(numbers, counts, strict=True):
            starts[number] = size
            size += padded(count)
        by_kernel = kernel.takes(*(self._live[number] for number in numbers))
        size = _size(counts, dtype)
        block = kernel.BLOCKS[dtype] if by_kernel else size
        memory = _allocate(self._num * size, dtype, place, self._live[0].device, folder)
        if place == "host" and self._live[0].device.type != "cpu":
            _pin(memory)
            weakref.finalize(self, _unpin, memory).atexit = False
        copies = memory.view(size // block, self._num, block)
        shares = self._shares(starts) if by_kernel else []
        outputs = [kernel.Outputs(share) for share in shares]
        return _Group(numbers, starts, copies, outputs, self._on_gpu(starts, copies))

    def _on_gpu(self, starts: dict[int, int], copies: Tensor) -> gpu_kernel.Outputs | None:
        if not self._by_triton:
            return None
        # Triton is there only where torch has CUDA.
        from megatron_mergemix.merge.gpu_kernel import Outputs

        return Outputs([self._live[n] for n in starts], list(starts.values()), copies[0])

    def _shares(self, starts: dict[int, int]) -> list[list[tuple[Tensor, int, int, int]]]:
        """Deal the elements out to the threads, cutting tensors where a share ends."""
        total = sum(padded(self._live[number].numel()) for number in starts)
        share = padded(max(-(-total // torch.get_num_threads()), SMALLEST_SHARE))
        shares: list[list[tuple[Tensor, int, int, int]]] = []
        room = 0
        for number, start in starts.items():
            tensor, done = self._live[number], 0
            while done < tensor.numel():
                if room == 0:
                    shares.append([])
                    room = share
                count = min(room, tensor.numel() - done)
                shares[-1].append((tensor, start + done, done, count))
                done, room = done + count, room - padded(count)
        return shares

    def _make_buffers(self, passing: bool) -> None:
        """Make what torch needs to sum: fp32 sums, and room for copies from another memory."""
        by_torch = [group for group in self._groups if not group.shares and not group.on_gpu]
        longest = max((self._live[n].numel() for g in by_torch for n in g.numbers), default=0)
        device = self._live[0].device
        length = min(block_size(device), longest)
        self._sums = torch.empty(length, dtype=torch.float32, device=device)
        self._staged = {
            group.copies.dtype: torch.empty(
                self._num, length, dtype=group.copies.dtype, device=device
            )
            for group in by_torch
            if passing
        }

    def pieces(self, number: int, length: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield where the elements of a live tensor lie in all copies.

        Yields:
            A slice of the flat live tensor, about ``length`` elements at most, and a view of the
            same elements in the copies, ``[blocks, copies, elements]``.
        """
        group, count, done = self._group_of[number], self._live[number].numel(), 0
        size = group.copies.shape[2]
        while done < count:
            block, at = divmod(group.starts[number] + done, size)
            whole = min(count - done, length) // size
            if at == 0 and whole > 0:
                piece = group.copies[block : block + whole]
            else:
                piece = group.copies[block : block + 1, :, at : at + min(count - done, length)]
            elements = piece.numel() // self._num
            yield slice(done, done + elements), piece
            done += elements

    def keep(self, copy: int) -> None:
        """Make a copy what the live tensors are now."""
        with torch.no_grad():
            for number, tensor in enumerate(self._live):
                for part, piece in self.pieces(number, tensor.numel()):
                    mine = piece[:, copy]
                    mine.copy_(tensor[part].view(mine.shape))

    def write_sum(self, weights: Sequence[float]) -> None:
        """Make the live tensors ``sum_i weights[i] * copy_i``.

        Accumulated in fp32 and rounded once. Copies of weight zero are not read; a single copy of
        weight one comes back bit for bit.

        Args:
            weights: one per copy, at least one of them not zero.
        """
        assert any(weights), "nothing to sum"
        with torch.no_grad():
            for group in self._groups:
                if group.shares:
                    work = [(share, group.copies, weights) for share in group.shares]
                    for _ in self._threads.map(lambda words: kernel.weighted_sums(*words), work):
                        pass
                elif group.on_gpu is not None:
                    group.on_gpu.write_sum(weights)
                else:
                    self._sum_by_torch(group, weights)

    def _sum_by_torch(self, group: _Group, weights: Sequence[float]) -> None:
        used = [(copy, weight) for copy, weight in enumerate(weights) if weight != 0.0]
        staged, length = self._staged.get(group.copies.dtype), len(self._sums)
        for number in group.numbers:
            live, first = self._live[number], group.starts[number]
            for start in range(0, live.numel(), length):
                out = live[start : start + length]
                place = slice(first + start, first + start + len(out))
                sources = [group.copies[0, copy, place] for copy, _ in used]
                if staged is not None:
                    sources = [
                        buffer[: len(out)].copy_(source, non_blocking=True)
                        for buffer, source in zip(staged, sources, strict=False)
                    ]
                weighted_sum_(out, sources, [weight for _, weight in used], self._sums)


def _allocate(
    size: int, dtype: torch.dtype, place: Place, device: torch.device, folder: Path
) -> Tensor:
    """Return a flat tensor, uninitialised."""
    if place == "file":
        return _mapped(size, dtype, folder)
    if place == "host" and device.type != "cpu":
        # To be pinned: whole pages of its own, and shared, so that no fork gives them to a child.
        return torch.frombuffer(_anonymous(size * dtype.itemsize), dtype=dtype)
    memory = torch.empty(size, dtype=dtype, device=device)
    if device.type == "cpu":
        _ask_for_huge_pages(memory)
    return memory


def _anonymous(num_bytes: int) -> mmap.mmap:
    try:
        return mmap.mmap(-1, num_bytes)
    except OSError as error:
        raise MergeMixError(
            f"cannot hold base and experts in {num_bytes / 2**30:.2f} GiB of host memory: "
            f"{error.strerror}. Use search.resident: file, or give the job more memory."
        ) from error


def _pin(memory: Tensor) -> None:
    """Pin memory for as much as it takes; torch's own allocator takes the next power of two.

    Raises:
        MergeMixError: CUDA refuses.
    """
    cuda = torch.cuda.cudart()
    code = cuda.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if int(code) != 0:
        raise MergeMixError(
            f"cannot hold base and experts in {memory.nbytes / 2**30:.2f} GiB of pinned host "
            f"memory: {cuda.cudaGetErrorString(code)} (CUDA error {int(code)}). Use "
            "search.resident: file, or give the job more memory of this machine."
        )


def _unpin(memory: Tensor) -> None:
    with contextlib.suppress(RuntimeError):  # of a device that failed before
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


def _ask_for_huge_pages(memory: Tensor) -> None:
    """Spare the processor most of its page table, where Linux gives huge pages to who asks."""
    start = padded(memory.data_ptr(), _HUGE_PAGE)
    length = memory.data_ptr() + memory.nbytes - start
    if sys.platform == "linux" and length >= _HUGE_PAGE:
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)


def _mapped(size: int, dtype: torch.dtype, folder: Path) -> Tensor:
    needed = size * dtype.itemsize
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            # Taken at once: a disk that fills up later would end the process without a word.
            os.posix_fallocate(file.fileno(), 0, needed)
            return torch.from_file(file.name, shared=True, size=size, dtype=dtype)
    except OSError as error:
        raise MergeMixError(
            f"cannot hold base and experts in a file of {needed / 2**30:.2f} GiB in {folder}: "
            f"{error.strerror}. Set TMPDIR to a folder on a disk of this machine with more room."
        ) from error
