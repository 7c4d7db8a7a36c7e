"""The GPU kernel: weighted sums of whole copies into many tensors, one launch, one pass (Triton).

Triton comes with torch where torch has CUDA. Without it torch sums copy by copy, which moves three
times as many bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096
"""Elements that one program sums: with 256 threads, 16-byte loads of every copy are in flight."""

ALIGNMENT = 16
"""Bytes of the widest load; tensors and copies that begin at such addresses are moved by it."""


@triton.jit
def _weighted_sums(  # type: ignore[no-untyped-def]
    addresses,
    starts,
    counts,
    copies,
    offsets,
    weights,
    NUM: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    tile = tl.program_id(0)
    inside = tl.arange(0, TILE)
    out = tl.load(addresses + tile).to(tl.pointer_type(copies.dtype.element_ty))
    start = tl.multiple_of(tl.load(starts + tile), ALIGNMENT)
    if WHOLE:  # without a mask, and where addresses are known to be round, loads are wide
        out = tl.multiple_of(out, ALIGNMENT)
        mask = None
    else:
        mask = inside < tl.load(counts + tile)
    # The first product begins the sum: zero would swallow the sign of -0.0.
    first = copies + start + tl.multiple_of(tl.load(offsets), ALIGNMENT)
    total = tl.load(first + inside, mask).to(tl.float32) * tl.load(weights)
    for i in tl.static_range(1, NUM):
        copy = copies + start + tl.multiple_of(tl.load(offsets + i), ALIGNMENT)
        total = tl.fma(tl.load(copy + inside, mask).to(tl.float32), tl.load(weights + i), total)
    tl.store(out + inside, total.to(copies.dtype.element_ty), mask)


class Outputs:
    """Where sums of copies go: tiles of tensors, kept on the device.

    Args:
        tensors: contiguous, on one device and of one dtype; they keep their storage for good.
        starts: element of a copy at which each begins, a multiple of ``ALIGNMENT``.
        copies: ``[num, size]``, contiguous, of the tensors' dtype and on their device; ``size`` is
            a multiple of ``ALIGNMENT``.
    """

    def __init__(self, tensors: Sequence[Tensor], starts: Sequence[int], copies: Tensor) -> None:
        assert all(start % ALIGNMENT == 0 for start in starts)
        assert copies.shape[1] % ALIGNMENT == 0
        assert copies.data_ptr() % ALIGNMENT == 0
        self._copies = copies
        tiles: dict[bool, list[tuple[int, int, int]]] = {True: [], False: []}
        for tensor, start in zip(tensors, starts, strict=True):
            assert tensor.dtype == copies.dtype
            assert tensor.is_contiguous()
            for done in range(0, tensor.numel(), TILE):
                address = tensor.data_ptr() + done * tensor.itemsize
                count = min(TILE, tensor.numel() - done)
                is_whole = count == TILE and address % ALIGNMENT == 0
                tiles[is_whole].append((address, start + done, count))
        self._tiles = {
            is_whole: torch.tensor(rows, device=copies.device).T.contiguous()
            for is_whole, rows in tiles.items()
            if rows
        }
        self._offsets = torch.zeros(len(copies), dtype=torch.int64, device=copies.device)
        self._weights = torch.zeros(len(copies), dtype=torch.float32, device=copies.device)

    def write_sum(self, weights: Sequence[float]) -> None:
        """Make the tensors ``sum_i weights[i] * copies[i]``, accumulated in fp32, rounded once.

        Queued on the current stream; nothing is allocated on the device. A kernel is compiled for
        every number of weights that are not zero, once.

        Args:
            weights: one per copy; copies of weight zero are not read.
        """
        used = [(n * self._copies.shape[1], w) for n, w in enumerate(weights) if w != 0.0]
        self._offsets[: len(used)].copy_(torch.tensor([offset for offset, _ in used]))
        self._weights[: len(used)].copy_(torch.tensor([weight for _, weight in used]))
        for is_whole, (addresses, starts, counts) in self._tiles.items():
            _weighted_sums[(len(addresses),)](
                *(addresses, starts, counts, self._copies, self._offsets, self._weights),
                NUM=len(used),
                TILE=TILE,
                WHOLE=is_whole,
                ALIGNMENT=ALIGNMENT,
                num_warps=8,
            )


def try_out(device_type: str) -> None:
    """Compile the kernel and run it once, on small tensors of the current device.

    Raises:
        Exception: whatever went wrong, in Triton, in a compiler that it calls, or on the device.
    """
    copies = torch.tensor([[1.0], [2.0]], device=device_type).repeat(1, TILE + ALIGNMENT)
    live = torch.zeros(TILE + 1, device=device_type)  # a whole tile, and one that is not
    Outputs([live], [0], copies).write_sum([0.5, 0.5])
    if not bool((live == 1.5).all()):
        raise RuntimeError("a sum that is 1.5 everywhere came out otherwise.")
