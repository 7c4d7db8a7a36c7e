"""Merge Megatron checkpoints on disk, from the first check to the published result."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from megatron_mergemix import __version__
from megatron_mergemix.checkpoint import integrity
from megatron_mergemix.checkpoint.checks import padded_differently
from megatron_mergemix.checkpoint.common_state import Layout, merged_common
from megatron_mergemix.checkpoint.crc import of_pieces
from megatron_mergemix.checkpoint.fingerprint import fingerprint
from megatron_mergemix.checkpoint.index import CheckpointIndex
from megatron_mergemix.checkpoint.legacy import LegacyIndex
from megatron_mergemix.checkpoint.legacy_writer import (
    LegacyOutput,
    make_folders,
    plan_legacy,
    sync_folders,
    write_legacy_frames,
)
from megatron_mergemix.checkpoint.publish import PROVENANCE, check_target, publishing_folder
from megatron_mergemix.checkpoint.reader import CheckpointReader
from megatron_mergemix.checkpoint.saves import TRACKER
from megatron_mergemix.checkpoint.storages import storage_checks
from megatron_mergemix.checkpoint.writer import (
    OpenFiles,
    Output,
    plan_output,
    write_entries,
    write_file,
    write_frames,
    write_rest,
)
from megatron_mergemix.errors import CheckpointError
from megatron_mergemix.merge.engine import (
    FLOATS,
    Done,
    Job,
    Source,
    in_threads,
    merge_chunks,
    scan_units,
    with_facts,
)
from megatron_mergemix.merge.inputs import check_inputs, opened
from megatron_mergemix.merge.methods import METHODS, Recipe
from megatron_mergemix.merge.scan import units
from megatron_mergemix.processes.process_life import die_with_parent

MASTER = r"(?:chained_\d+\.)?optimizer\.state\.(?:param|fp32_param)\."
"""Beginning of the name of an fp32 master weight, before the name of the parameter."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Settings:
    """How checkpoints are merged; see ``mergemix merge --help``."""

    layout: Layout = "common.pt"
    overwrite: bool = False
    allow_non_finite: bool = False
    verify: bool = True
    write_integrity: bool = False
    from_master_weights: bool = False
    vocab_size: int | None = None
    threads: int = field(default_factory=lambda: max(2, min(8, os.cpu_count() or 1)))
    workers: int = 1

    def torch_dist_only(self) -> list[str]:
        """Return the flags that are set and that legacy checkpoints cannot serve."""
        flags = {
            "--from-master-weights": self.from_master_weights,
            "--write-integrity": self.write_integrity,
            "--layout common_state": self.layout == "common_state",
        }
        return [flag for flag, is_set in flags.items() if is_set]


@dataclass(frozen=True)
class Summary:
    """What a merge did.

    Attributes:
        folder: the iteration folder that was written.
        read: bytes of model tensors that were read.
        written: bytes of model tensors that were written.
        seconds: from the first check to the published result.
        non_finite: (file, tensor) -> elements that are NaN or infinite.
    """

    folder: Path
    read: int
    written: int
    seconds: float
    non_finite: Mapping[tuple[str, str], int]


def merge_checkpoints(
    base: Path,
    experts: Mapping[str, tuple[Path, float]],
    recipe: Recipe,
    target: Path,
    settings: Settings,
    origin: Mapping[str, Any],
) -> Summary:
    """Merge ``experts`` onto ``base`` and publish the result as the checkpoint root ``target``.

    Args:
        base: root or iteration folder; gives format, layout, ``_extra_state`` and arguments.
        experts: name -> (root or iteration folder, weight); of weight zero: nothing is opened.
        recipe: method and its settings; its weights are set from ``experts``.
        target: root to be written, with ``release/`` in it.
        settings: see :class:`Settings`.
        origin: further entries of the provenance, as plain JSON values.

    Raises:
        CheckpointError: an input is damaged or does not fit, the target exists, the disk is full,
            or an element is NaN or infinite. Nothing is published then.
    """
    started = time.monotonic()
    check_target(target, settings.overwrite)
    used = {name: (path, weight) for name, (path, weight) in experts.items() if weight != 0.0}
    recipe = replace(recipe, weights=tuple(weight for _, weight in used.values()))
    base_index = opened(base)
    indexes = {name: opened(path) for name, (path, _) in used.items()}
    flags = settings.torch_dist_only()
    check_inputs(base_index, indexes, recipe.method, settings.vocab_size, flags)
    reads_base = recipe.base_is_read()
    base_source = _source("base", base_index, settings, verify=reads_base)
    sources = [_source(name, index, settings) for name, index in indexes.items()]
    provenance = _provenance(base_index, experts, indexes, recipe, settings, origin)
    num_bytes = sum(tensor.num_bytes for tensor in base_index.model_tensors().values())
    rows = padded_differently(base_index, indexes.values())
    with publishing_folder(target, num_bytes) as building:
        folder = building / "release"
        folder.mkdir()
        job = Job(
            recipe=recipe,
            base=base_source,
            experts=tuple(sources),
            output=_plan(base_index, folder, provenance, settings.layout),
            real_rows=dict.fromkeys(rows, settings.vocab_size or 0),
            threads=settings.threads,
        )
        bad = _merge(job, settings)
        if bad and not settings.allow_non_finite:
            raise CheckpointError(_non_finite(bad))
        if settings.write_integrity:
            write_file(folder / integrity.FILE, integrity.manifest_bytes(folder, settings.threads))
        write_file(building / PROVENANCE, (json.dumps(provenance, indent=2) + "\n").encode())
        write_file(building / TRACKER, b"release")
    seconds = time.monotonic() - started
    read = num_bytes * len(job.sources())
    return Summary(target / "release", read, num_bytes, seconds, bad)


# ---- before the work ----


def _source(label: str, index: CheckpointIndex, settings: Settings, verify: bool = True) -> Source:
    check_crc = False
    if settings.verify and verify:
        check_crc = not integrity.verify(index.path, settings.threads)
    stored = _masters(label, index) if settings.from_master_weights else {}
    return Source(label, index, stored, check_crc)


def _masters(label: str, index: CheckpointIndex) -> dict[str, str]:
    """Return model tensor -> fp32 master weight, for all that are merged."""
    masters = {}
    for name, tensor in index.tensors.items():
        if (match := re.match(MASTER, name)) and tensor.dtype == "float32":
            masters[name[match.end() :]] = name
    wanted = {n: t for n, t in index.model_tensors().items() if t.dtype in ("bfloat16", "float16")}
    lacking = [
        name
        for name, tensor in wanted.items()
        if name not in masters or index.tensors[masters[name]].shape != tensor.shape
    ]
    if lacking:
        raise CheckpointError(
            f"{label} ({index.path}) has no fp32 master weight per parameter for {lacking[0]}"
            + (f" and {len(lacking) - 1} more" if len(lacking) > 1 else "")
            + ". Train with --dist-ckpt-optim-fully-reshardable, or merge without "
            "--from-master-weights."
        )
    return {name: masters[name] for name in wanted}


def _provenance(
    base: CheckpointIndex,
    experts: Mapping[str, tuple[Path, float]],
    indexes: Mapping[str, CheckpointIndex],
    recipe: Recipe,
    settings: Settings,
    origin: Mapping[str, Any],
) -> dict[str, Any]:
    """Return who was merged and how, as plain JSON values."""
    return {
        "mergemix": __version__,
        "method": recipe.method,
        "scale": recipe.scale,
        "density": recipe.density,
        "seed": recipe.seed,
        "from_master_weights": settings.from_master_weights,
        "base": {"path": str(base.path), "iteration": base.iteration, "digest": fingerprint(base)},
        "experts": {
            name: {"path": str(path), "weight": 0.0}
            if name not in indexes
            else {
                "path": str(indexes[name].path),
                "weight": weight,
                "iteration": indexes[name].iteration,
                "digest": fingerprint(indexes[name]),
            }
            for name, (path, weight) in experts.items()
        },
        **origin,
    }


# ---- the work ----


def _plan(base: CheckpointIndex, folder: Path, provenance: object, layout: Layout) -> Output:
    if isinstance(base, LegacyIndex):
        output = plan_legacy(base, folder, provenance)
        make_folders(output)
        return output
    return plan_output(base, folder, merged_common(base, provenance, layout), layout)


def _merge(job: Job, settings: Settings) -> Counter[tuple[str, str]]:
    """Do the whole job; return what is not finite."""
    output = job.output
    if METHODS[job.recipe.method].scan is not None:
        wanted = [
            unit
            for name, tensor in job.base.index.model_tensors().items()
            if tensor.dtype in FLOATS
            for unit in units(name, tensor.shape)
        ]
        facts: dict[Any, Any] = {}
        for part in _in_processes(scan_units, job, _deal(wanted, settings.workers)):
            facts.update(part)
        job = with_facts(job, facts)
    done = list(_in_processes(merge_chunks, job, _cut(output, settings.workers)))
    _check_crcs(job, done, settings.verify)
    with OpenFiles(output) as files:
        crcs = {}
        for number, chunk in enumerate(output.chunks):
            pieces = [piece for part in done for piece in part.written.get(number, [])]
            crc = of_pieces(pieces, chunk.archive.num_bytes)
            assert crc is not None, f"{chunk.name} was not written whole"
            crcs[chunk] = crc
        if isinstance(output, LegacyOutput):
            write_legacy_frames(output, files, crcs)
        else:
            write_frames(output, files, crcs)
            write_entries(output, files, CheckpointReader(job.base.index), settings.verify)
        files.sync()
    if isinstance(output, LegacyOutput):
        sync_folders(output)
    else:
        write_rest(output)
    return sum((part.bad for part in done), Counter())


def _check_crcs(job: Job, done: Sequence[Done], verify: bool) -> None:
    """Compare all that was read with the CRC-32 of the archives it was read from."""
    tasks: list[Callable[[], None]] = []
    for source in job.sources():
        if not source.check_crc:
            continue
        reader = CheckpointReader(source.index)
        for part in done:
            for chunk, pieces in part.seen.get(source.label, {}).items():
                reader.seen.setdefault(chunk, []).extend(pieces)
        names = source.index.model_tensors()
        if isinstance(source.index, LegacyIndex):
            tasks += [check.run for check in storage_checks(source.index, names, reader.seen)]
        else:
            tasks += [partial(reader.check_crcs, source.stored.get(n, n)) for n in names]
    if verify and isinstance(job.base.index, LegacyIndex):
        copied = [c.name for c in job.output.chunks if c.archive.dtype not in FLOATS]
        tasks += [check.run for check in storage_checks(job.base.index, copied, {})]
    in_threads(job.threads, lambda task: task(), tasks)


def _in_processes(
    work: Callable[[Job, Sequence[T]], R], job: Job, parts: Sequence[Sequence[T]]
) -> Iterable[R]:
    """Yield ``work(job, part)`` for every part: the first is done here, each other by a process.

    Raises:
        CheckpointError: a process was killed.
    """
    if len(parts) == 1:
        yield work(job, parts[0])
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(parts) - 1, context, _start_worker, (os.getpid(),)) as pool:
        futures = [pool.submit(work, job, part) for part in parts[1:]]
        yield work(job, parts[0])
        try:
            for future in futures:
                yield future.result()
        except BrokenProcessPool as error:
            raise CheckpointError(
                "a worker process was killed, perhaps for lack of memory. Nothing was published; "
                "use fewer --workers."
            ) from error


def _start_worker(parent: int) -> None:
    die_with_parent(parent)  # a worker of a pool would wait for more work for ever


def _deal(items: Sequence[T], workers: int) -> list[list[T]]:
    return [list(items[worker::workers]) for worker in range(max(1, min(workers, len(items))))]


def _cut(output: Output, workers: int) -> list[list[int]]:
    """Cut the output chunks into runs of about the same number of bytes, in file order."""
    total = sum(chunk.archive.num_bytes for chunk in output.chunks)
    parts: list[list[int]] = [[] for _ in range(workers)]
    before = 0
    for number, chunk in enumerate(output.chunks):
        parts[min(workers - 1, before * workers // max(total, 1))].append(number)
        before += chunk.archive.num_bytes
    return [part for part in parts if part] or [[]]


def _non_finite(bad: Mapping[tuple[str, str], int]) -> str:
    lines = [f"  {file}: {name}: {count}" for (file, name), count in sorted(bad.items())]
    more = [f"  and {len(lines) - 20} more tensors"] if len(lines) > 20 else []
    return "\n".join(
        [
            "NaN or infinite elements; nothing was published:",
            *lines[:20],
            *more,
            "Name an earlier save or train again; --allow-non-finite merges all the same.",
        ]
    )
