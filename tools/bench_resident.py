#!/usr/bin/env python
"""How close the resident merge comes to memory bandwidth: its GB/s beside ``Tensor.copy_``.

    python tools/bench_resident.py [--gigabytes 0.5] [--device cpu|cuda] [--place device|host|file]

Flat copies of a model of the given size are merged into live tensors in the shapes of a
transformer. A merge of K experts reads K copies and writes one, ``copy_`` reads one and writes
one; both rates count every byte that is read or written. The two take turns, and the ratio is that
of their medians in the same rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_mergemix.merge import kernel
from megatron_mergemix.merge.flat import FlatCopies, copy_bytes
from megatron_mergemix.merge.placement import PLACES

WIDTH = 1024
"""Of the transformer whose shapes the live tensors have."""


def main() -> None:
    """Print a table, one row per dtype and number of experts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=0.5, help="of one copy")
    parser.add_argument("--experts", type=int, nargs="+", default=[3, 5, 9])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--place", choices=PLACES, default="device")
    args = parser.parse_args()
    device = torch.device(args.device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{where}, {torch.get_num_threads()} threads, copies in: {args.place}")
    print(
        f"{'dtype':9s} {'K':>2s} {'merge GB/s':>11s} {'copy_ GB/s':>11s} {'ratio':>6s}  per merge"
    )
    for dtype in (torch.float32, torch.bfloat16):
        for num in args.experts:
            live = tensors(args.gigabytes, dtype, device)
            merged, copied, seconds = rates(live, num, args.place, args.rounds)
            print(
                f"{str(dtype)[6:]:9s} {num:2d} {merged:11.1f} {copied:11.1f} "
                f"{merged / copied:6.2f}  {1e3 * seconds:.1f} ms",
                flush=True,
            )


def tensors(gigabytes: float, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """Return tensors in the shapes of transformer layers, of at least the given size together."""
    layer = [(3 * WIDTH, WIDTH), (WIDTH,), (WIDTH, WIDTH), (WIDTH,), (8 * WIDTH, WIDTH)]
    layer += [(WIDTH, 4 * WIDTH), (WIDTH,)]
    made: list[torch.Tensor] = []
    while copy_bytes(made) < gigabytes * 1e9:
        made += [torch.rand(shape, device=device).to(dtype) for shape in layer]
    return made


def rates(
    live: list[torch.Tensor], num: int, place: str, rounds: int
) -> tuple[float, float, float]:
    """Return bytes per nanosecond of the merge and of ``copy_``, and the seconds of a merge."""
    size = copy_bytes(live)
    with tempfile.TemporaryDirectory() as folder:
        on_gpu = live[0].device.type == "cuda"
        by_triton = on_gpu and kernel.missing("cuda") is None
        copies = FlatCopies(live, num, place, Path(folder), by_triton)  # type: ignore[arg-type]
    for copy in range(num):
        copies.keep(copy)
    weights = [1 / num] * num
    elements = size // live[0].element_size()
    source = torch.rand(elements, device=live[0].device).to(live[0].dtype)
    target = torch.zeros_like(source)
    merges, copyings = [], []
    for _ in range(rounds + 1):
        merges.append(seconds_of(lambda: copies.write_sum(weights), live[0].device))
        copyings.append(seconds_of(lambda: target.copy_(source), live[0].device))
    merge, copying = statistics.median(merges[1:]), statistics.median(copyings[1:])
    return (num + 1) * size / merge / 1e9, 2 * size / copying / 1e9, merge


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return the wall seconds of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
