"""Flat copies: exact sums into tensors that stay where they are, wherever the copies lie."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mergemix.errors import MergeMixError
from megatron_mergemix.merge import flat, kernel
from megatron_mergemix.merge.flat import FlatCopies, copy_bytes, padded
from megatron_mergemix.merge.linear import weighted_sum_

SHAPES = [(1,), (3, 5), (64,), (1000, 33), (7,), (129, 2)]
MIXED = [torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]


def models(num: int, dtypes: list[torch.dtype], seed: int = 0) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            torch.randn(shape, generator=generator).to(dtypes[n % len(dtypes)])
            for n, shape in enumerate(SHAPES)
        ]
        for _ in range(num)
    ]


def held(sources: list[list[torch.Tensor]], place: str, folder: Path) -> tuple[list, FlatCopies]:
    """Return live tensors and the copies that hold the sources."""
    live = [torch.empty_like(tensor) for tensor in sources[0]]
    copies = FlatCopies(live, len(sources), place, folder)  # type: ignore[arg-type]
    for number, source in enumerate(sources):
        for tensor, value in zip(live, source, strict=True):
            tensor.copy_(value)
        copies.keep(number)
    return live, copies


def expected_sum(sources: list[list[torch.Tensor]], weights: list[float]) -> list[torch.Tensor]:
    sums = []
    for parts in zip(*sources, strict=True):
        out = torch.empty_like(parts[0]).view(-1)
        weighted_sum_(out, [part.reshape(-1) for part in parts], weights, torch.empty(100))
        sums.append(out.view(parts[0].shape))
    return sums


@pytest.mark.parametrize("place", ["device", "file"])
@pytest.mark.parametrize("by_kernel", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.bfloat16], MIXED])
def test_a_sum_has_the_bits_of_each_tensor_summed_alone(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    place: str,
    by_kernel: bool,
    threads: int,
    dtypes: list[torch.dtype],
) -> None:
    sources = models(4, dtypes)
    weights = [0.5, 0.0, 0.75, -0.25]
    expected = expected_sum(sources, weights)
    for tensor in sources[1]:
        tensor.fill_(float("nan"))  # a weight of zero is no factor: the copy is not read
    monkeypatch.setattr(flat, "SMALLEST_SHARE", 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    if not by_kernel:
        monkeypatch.setattr(kernel, "library", lambda: None)
    live, copies = held(sources, place, tmp_path)
    addresses = [tensor.data_ptr() for tensor in live]
    copies.write_sum(weights)
    for found, wanted in zip(live, expected, strict=True):
        assert torch.equal(found, wanted)
    assert [tensor.data_ptr() for tensor in live] == addresses


@pytest.mark.parametrize("by_kernel", [True, False])
def test_a_single_copy_comes_back_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, by_kernel: bool
) -> None:
    if not by_kernel:
        monkeypatch.setattr(kernel, "library", lambda: None)
    sources = models(3, MIXED)
    sources[1][0][0] = -0.0
    sources[1][1][0, 0] = 1e-42  # subnormal
    live, copies = held(sources, "device", tmp_path)
    copies.write_sum([0.3, 0.3, 0.4])
    copies.write_sum([0.0, 1.0, 0.0])
    for found, wanted in zip(live, sources[1], strict=True):
        assert torch.equal(found, wanted)
        assert torch.equal(found.signbit(), wanted.signbit())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=12), st.integers(1, 5))
def test_threads_share_every_element_once(sizes: list[int], threads: int) -> None:
    live = [torch.zeros(size) for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flat, "SMALLEST_SHARE", 500)
        patch.setattr(torch, "get_num_threads", lambda: threads)
        copies = FlatCopies(live, 1, "device", Path("."))
    written = [torch.zeros(size) for size in sizes]
    starts = copies._groups[0].starts
    shares = copies._shares(starts)
    for tensor, start, offset, count in (place for share in shares for place in share):
        number = next(n for n, t in enumerate(live) if t.data_ptr() == tensor.data_ptr())
        assert start == starts[number] + offset
        written[number][offset : offset + count] += 1
    assert all(bool((w == 1).all()) for w in written)
    assert len(shares) <= threads


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 9000), min_size=1, max_size=6),
    st.sampled_from([1, 100, 2048, 5000, 10**6]),
    st.booleans(),
)
def test_pieces_are_the_kept_values_in_their_order(
    sizes: list[int], length: int, by_kernel: bool
) -> None:
    live = [torch.empty(size) for size in sizes]
    sources = [[torch.rand(size) for size in sizes] for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        if not by_kernel:
            patch.setattr(kernel, "library", lambda: None)
        copies = FlatCopies(live, 2, "device", Path("."))
    for copy, source in enumerate(sources):
        for tensor, value in zip(live, source, strict=True):
            tensor.copy_(value)
        copies.keep(copy)
    for number, size in enumerate(sizes):
        found, end = torch.full((2, size), -1.0), 0
        for part, piece in copies.pieces(number, length):
            assert part.start == end
            assert part.stop - part.start <= max(length, 1)
            found[:, part] = piece.transpose(0, 1).reshape(2, -1)
            end = part.stop
        assert torch.equal(found, torch.stack([source[number] for source in sources]))


def test_views_into_one_buffer_are_written_and_nothing_beside_them(tmp_path: Path) -> None:
    """As the parameters of Megatron's DDP lie in its buffer."""
    buffer = torch.full((1000,), 7.0)
    live = [buffer[3:103], buffer[110:800].view(10, 69)]
    copies = FlatCopies(live, 2, "device", tmp_path)
    for number, value in enumerate((1.0, 2.0)):
        for tensor in live:
            tensor.fill_(value)
        copies.keep(number)
    copies.write_sum([0.5, 0.5])
    expected = torch.full((1000,), 7.0)
    expected[3:103] = expected[110:800] = 1.5
    assert torch.equal(buffer, expected)


def test_a_copy_takes_the_bytes_that_are_announced() -> None:
    live = [torch.zeros(3), torch.zeros(64, dtype=torch.bfloat16)]
    assert copy_bytes(live) == 2 * 8192, "whole blocks of each dtype"
    assert copy_bytes([torch.zeros(6_000)]) == 3 * 8192
    assert padded(65) == 128


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages"
)
def test_large_copies_ask_for_huge_pages(tmp_path: Path) -> None:
    copies = FlatCopies([torch.zeros(1 << 21)], 2, "device", tmp_path)
    inside = copies._groups[0].copies.data_ptr() + (1 << 22)
    flags: list[str] = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if mapping := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_it = int(mapping[1], 16) <= inside < int(mapping[2], 16)
        elif line.startswith("VmFlags:") and is_it:
            flags = line.split()
    assert "hg" in flags


def test_the_file_has_no_name_and_goes_with_the_copies(tmp_path: Path) -> None:
    def deleted_files() -> int:
        links = [f"/proc/self/map_files/{name}" for name in os.listdir("/proc/self/map_files")]
        return sum(str(tmp_path) in os.readlink(link) for link in links)

    _, copies = held(models(2, [torch.float32]), "file", tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert deleted_files() > 0
    del copies
    gc.collect()
    assert deleted_files() == 0


def test_a_disk_without_room_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(file: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(MergeMixError, match=r"0\.00 GiB in .*No space left.*Set TMPDIR"):
        FlatCopies([torch.zeros(1000)], 2, "file", tmp_path)
    assert list(tmp_path.iterdir()) == []


class Cuda:
    """Stands in for CUDA's runtime: what is pinned, by address, and the code that it returns."""

    class Code:
        """Like that of torch, it equals no number."""

        def __init__(self, number: int) -> None:
            self.number = number

        def __int__(self) -> int:
            return self.number

    def __init__(self, code: int = 0) -> None:
        self.code = self.Code(code)
        self.pinned: dict[int, int] = {}
        self.waited = 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> Code:  # noqa: N802
        if int(self.code) == 0:
            self.pinned[address] = size
        return self.code

    def cudaHostUnregister(self, address: int) -> Code:  # noqa: N802
        assert self.waited, "copies may be under way"
        ctypes.memset(address, 0, self.pinned.pop(address))  # still there
        return self.code

    def cudaGetErrorString(self, code: Code) -> str:  # noqa: N802
        return "out of memory"

    def synchronize(self) -> None:
        self.waited += 1


def on_a_device(monkeypatch: pytest.MonkeyPatch, cuda: Cuda) -> list[torch.Tensor]:
    """Return live tensors that are not on the CPU, but on a device that stands in for a GPU."""
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "synchronize", cuda.synchronize)
    dtypes = (torch.float32, torch.bfloat16)
    return [torch.empty(size, dtype=d, device="meta") for d in dtypes for size in (100_000, 7)]


def test_host_memory_is_pinned_for_as_much_as_it_takes_and_let_go(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cuda = Cuda()
    live = on_a_device(monkeypatch, cuda)
    copies = FlatCopies(live, 3, "host", tmp_path)
    held = [group.copies for group in copies._groups]
    assert cuda.pinned == {memory.data_ptr(): memory.nbytes for memory in held}
    assert sum(cuda.pinned.values()) == 3 * copy_bytes(live), "as was planned, in two groups"
    assert all(address % mmap.PAGESIZE == 0 for address in cuda.pinned)
    assert all(memory.device.type == "cpu" for memory in held)
    for memory in held:
        memory.fill_(1.0)
    del copies, held, memory
    gc.collect()
    assert cuda.pinned == {}


def test_host_memory_that_cannot_be_pinned_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    live = on_a_device(monkeypatch, Cuda(code=2))
    with pytest.raises(MergeMixError, match=r"pinned host memory: out of memory \(CUDA error 2\)"):
        FlatCopies(live, 3, "host", tmp_path)


def allocated_by(copies: FlatCopies) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        copies.write_sum([0.1, 0.2, 0.3, 0.4])
    return sum(abs(event.self_cpu_memory_usage) for event in profiler.key_averages())


def test_nothing_is_allocated_for_a_candidate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, copies = held(models(4, MIXED), "device", tmp_path)
    assert allocated_by(copies) == 0
    monkeypatch.setattr(kernel, "library", lambda: None)
    _, copies = held(models(4, MIXED), "device", tmp_path)
    assert allocated_by(copies) > 0, "torch makes fp32 of bf16, so this would be seen"
