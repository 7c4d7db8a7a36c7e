"""Merge checkpoints into a checkpoint: read, merge and write slice by slice.

Several threads take slices in the order of the files; while one waits for the disk, another does
arithmetic. Each element is computed from the same elements in the same way wherever it is cut,
so the result does not depend on threads, worker processes or parallel layouts.
"""

from __future__ import annotations

import contextlib
import gc
import math
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from isal.isal_zlib import crc32
from torch import Tensor

from megatron_mergemix.checkpoint.index import CheckpointIndex
from megatron_mergemix.checkpoint.reader import CheckpointReader
from megatron_mergemix.checkpoint.writer import OpenFiles, Output
from megatron_mergemix.merge import kernel
from megatron_mergemix.merge.linear import BLOCK
from megatron_mergemix.merge.methods import METHODS, Recipe, Unit
from megatron_mergemix.merge.scan import SCANS, unit_boxes
from megatron_mergemix.merge.slices import Slice, boxes, cut_rows, stacked_dims

SLICE = 1 << 20
"""Elements that a thread reads, merges and writes in one go."""

FLOATS = ("float64", "float32", "bfloat16", "float16")

_BITS: dict[int, tuple[torch.dtype, str]] = {
    2: (torch.int16, "u2"),
    4: (torch.int32, "u4"),
    8: (torch.int64, "u8"),
}
"""Bytes of a float -> integers of that size, with sign and without."""

Item = TypeVar("Item")
Piece = tuple[int, int, int]
"""First byte, length, CRC-32."""


@dataclass(frozen=True)
class Source:
    """A checkpoint that is read.

    Attributes:
        label: names it to the user.
        index: what it contains.
        stored: model tensor -> tensor that is read for it, where that is another one.
        check_crc: compare what is read with the CRC-32 of the archives.
    """

    label: str
    index: CheckpointIndex
    stored: Mapping[str, str] = field(default_factory=dict)
    check_crc: bool = False


@dataclass(frozen=True)
class Job:
    """A merge that is planned to the last byte; can be pickled for a worker process.

    Attributes:
        recipe: the arithmetic.
        base: gives layout, bytes entries, and all that is not merged.
        experts: those of non-zero weight.
        output: where everything goes.
        real_rows: tensor -> rows that are merged; the padding below is taken from the base.
        threads: per process.
    """

    recipe: Recipe
    base: Source
    experts: tuple[Source, ...]
    output: Output
    real_rows: Mapping[str, int]
    threads: int

    def sources(self) -> list[Source]:
        """Return what the arithmetic reads, in its order."""
        return [self.base, *self.experts] if self.recipe.base_is_read() else list(self.experts)


@dataclass
class Done:
    """What is known after a part of the work.

    Attributes:
        written: output chunk -> pieces of its elements.
        seen: label of a source -> what its reader saw.
        bad: (file, tensor) -> elements that are NaN or infinite.
    """

    written: dict[int, list[Piece]] = field(default_factory=lambda: defaultdict(list))
    seen: dict[str, dict[tuple[str, int], list[Piece]]] = field(default_factory=dict)
    bad: Counter[tuple[str, str]] = field(default_factory=Counter)


def in_threads(count: int, work: Callable[[Item], None], items: Iterable[Item]) -> None:
    """Call ``work`` for every item on ``count`` threads; items are taken in order.

    The first exception stops all threads and is raised.
    """
    iterator, lock, failed = iter(items), threading.Lock(), threading.Event()

    def run() -> None:
        try:
            while not failed.is_set():
                with lock:
                    item = next(iterator, iterator)
                if item is iterator:
                    return
                work(item)  # type: ignore[arg-type]
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(run) for _ in range(count)]:
            future.result()


def scan_units(job: Job, wanted: Sequence[Unit]) -> dict[Unit, Any]:
    """Return what the method must know about each unit."""
    scan = METHODS[job.recipe.method].scan
    if scan is None:
        return {}
    readers = [(CheckpointReader(source.index), source.stored) for source in job.sources()]
    shapes = {name: tensor.shape for name, tensor in job.base.index.model_tensors().items()}
    facts: dict[Unit, Any] = {}

    def work(unit: Unit) -> None:
        name, place = unit
        shape = shapes[name]
        if name in job.real_rows and not place:
            shape = (job.real_rows[name], *shape[1:])

        def blocks() -> Iterator[list[Tensor]]:
            for offsets, sizes in unit_boxes(place, shape):
                yield [
                    reader.read(stored.get(name, name), offsets, sizes).view(-1)
                    for reader, stored in readers
                ]

        facts[unit] = SCANS[scan](job.recipe, blocks)

    with _one_torch_thread():
        in_threads(job.threads, work, wanted)
    return facts


def merge_chunks(job: Job, numbers: Sequence[int]) -> Done:
    """Read, merge and write the output chunks of the given numbers."""
    done, lock = Done(), threading.Lock()
    with _one_torch_thread(), _not_collected(), OpenFiles(job.output) as files:
        worker = _Merger(job, files)

        def work(place: Slice) -> None:
            piece, bad = worker.merge(place)
            with lock:
                done.written[place.chunk].append(piece)
                done.bad.update(bad)

        in_threads(job.threads, work, (s for n in numbers for s in _slices(job, n)))
        files.sync()
    done.seen = {source.label: reader.seen for source, reader in worker.readers}
    return done


def _slices(job: Job, number: int) -> Iterator[Slice]:
    output = job.output.chunks[number]
    shape, begin = output.chunk.sizes, output.chunk.offsets
    start = 0
    for box in boxes(shape, SLICE, stacked_dims(output.name)):
        pieces: Iterable[Any] = [box]
        if (rows := job.real_rows.get(output.name)) is not None:
            pieces = cut_rows(box, begin[0] + box[0][0], rows)
        for offsets, sizes in pieces:
            where = tuple(a + b for a, b in zip(begin, offsets, strict=True))
            yield Slice(output.name, where, sizes, number, start)
            start += math.prod(sizes)


class _Merger:
    """Merges slices; every thread has buffers of its own."""

    def __init__(self, job: Job, files: OpenFiles) -> None:
        self.job = job
        self.files = files
        self.readers = [(s, CheckpointReader(s.index, s.check_crc)) for s in job.sources()]
        self.base = CheckpointReader(job.base.index)
        self.merge_slice = METHODS[job.recipe.method].merge
        self.local = threading.local()

    def merge(self, place: Slice) -> tuple[Piece, Counter[tuple[str, str]]]:
        """Write one slice; return its piece of the chunk and what in it is not finite."""
        output = self.job.output.chunks[place.chunk]
        dtype = getattr(torch, output.archive.dtype)
        out = self._buffer("out", math.prod(place.sizes), dtype)
        merged = output.archive.dtype in FLOATS and not self._is_padding(place)
        parts: list[Tensor] = []
        if merged:
            parts = [self._read(n, place) for n in range(len(self.readers))]
            accumulator = self._buffer("accumulator", BLOCK, torch.float32)
            self.merge_slice(self.job.recipe, place, out, parts, accumulator)
        else:
            self.base.read(place.name, place.offsets, place.sizes, out.view(place.sizes))
        data = out.view(torch.uint8).numpy().data
        first = place.start * out.element_size()
        self.files.write(output.chunk.file, output.elements + first, data)
        bad = Counter() if _is_finite(out) else self._blame(place, out, parts)
        return (first, len(data), crc32(data)), bad

    def _read(self, number: int, place: Slice) -> Tensor:
        source, reader = self.readers[number]
        name = source.stored.get(place.name, place.name)
        dtype = getattr(torch, source.index.tensors[name].dtype)
        buffer = self._buffer(f"source {number}", math.prod(place.sizes), dtype)
        reader.read(name, place.offsets, place.sizes, buffer.view(place.sizes))
        return buffer

    def _is_padding(self, place: Slice) -> bool:
        rows = self.job.real_rows.get(place.name)
        return rows is not None and place.offsets[0] >= rows

    def _blame(
        self, place: Slice, out: Tensor, parts: Sequence[Tensor]
    ) -> Counter[tuple[str, str]]:
        """Count the elements that are not finite, in the inputs if they are the cause."""
        bad: Counter[tuple[str, str]] = Counter()
        for (source, reader), part in zip(self.readers, parts, strict=False):
            if count := int(part.isfinite().logical_not().sum()):
                name = source.stored.get(place.name, place.name)
                files = reader.files(name, place.offsets, place.sizes)
                bad[", ".join(str(source.index.path / file) for file in files), name] += count
        if not bad and (count := int(out.isfinite().logical_not().sum())):
            where = "the base" if not parts else "the merged result (overflow)"
            bad[where, place.name] += count
        return bad

    def _buffer(self, use: str, size: int, dtype: torch.dtype) -> Tensor:
        buffers = self.local.__dict__.setdefault("buffers", {})
        if (use, dtype) not in buffers or len(buffers[use, dtype]) < size:
            buffers[use, dtype] = torch.empty(max(size, SLICE), dtype=dtype, device="cpu")
        return buffers[use, dtype][:size]


def with_facts(job: Job, facts: Mapping[Unit, Any]) -> Job:
    """Return the job with what the scans found."""
    return replace(job, recipe=replace(job.recipe, facts=facts))


def _is_finite(out: Tensor) -> bool:
    """Look at the bits: as integers, no number of either sign is as large as an infinity."""
    if not out.is_floating_point():
        return True
    if kernel.takes(out):
        return kernel.all_finite(out)
    signed, unsigned = _BITS[out.element_size()]
    infinities = torch.tensor([math.inf, -math.inf], dtype=out.dtype, device="cpu").view(signed)
    positive, negative = infinities.numpy()
    bits = out.view(signed).numpy()
    return bool(bits.max() < positive and bits.view(unsigned).max() < negative.view(unsigned))


class _one_torch_thread:
    """Torch's own threads would compete with ours."""

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *exc_info: object) -> None:
        torch.set_num_threads(self.before)


@contextlib.contextmanager
def _not_collected() -> Iterator[None]:
    """Keep the garbage collector from walking all of torch; slices leave it nothing to find."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
