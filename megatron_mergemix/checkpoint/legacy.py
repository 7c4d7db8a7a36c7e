"""Megatron's legacy ``torch`` checkpoints: a folder per rank, in it what that rank held.

``iter_0000010/mp_rank_<tensor>[_<pipeline>][_<expert>]/model_optim_rng.pt``. Here every tensor of
every rank is a tensor of its own, named ``mp_rank_00_001/model/decoder.final_layernorm.weight``;
the files do not tell what is split over ranks and what is copied.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_mergemix.checkpoint.archive import StoredTensor
from megatron_mergemix.checkpoint.checks import some
from megatron_mergemix.checkpoint.common_state import arguments
from megatron_mergemix.checkpoint.index import DTYPE_BYTES, CheckpointIndex, Chunk, TensorEntry
from megatron_mergemix.checkpoint.legacy_file import Place, read_file
from megatron_mergemix.errors import CheckpointError

FILE = "model_optim_rng.pt"
AXES = ("tensor", "pipeline", "expert")
CONVERT = (
    "convert it: load it in Megatron-LM under the layout that it was saved with, adding "
    "--ckpt-convert-format torch_dist --ckpt-convert-save DIR"
)

_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")


@dataclass(frozen=True, slots=True)
class LegacyIndex(CheckpointIndex):
    """Everything that one legacy checkpoint contains.

    Attributes:
        ranks: names of the ranks' folders, sorted.
        sizes: of each of ``AXES``.
    """

    ranks: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)


def is_legacy(folder: Path) -> bool:
    """Say whether a folder holds a legacy checkpoint, or a part of one."""
    return not (folder / "metadata.json").exists() and bool(_ranks(folder))


def read_legacy(folder: Path) -> LegacyIndex:
    """Return the index of the legacy checkpoint in ``folder``, one iteration's folder.

    Raises:
        CheckpointError: a rank's file is missing, damaged, of another save than the others, or
            holds what cannot be merged.
    """
    ranks = _ranks(folder)
    sizes: dict[str, int] = {}
    tensors: dict[str, TensorEntry] = {}
    stored: dict[tuple[str, int], StoredTensor] = {}
    iterations = set()
    for number, rank in enumerate(ranks):
        state, places = read_file(folder / rank / FILE)
        if number == 0:
            sizes = _sizes(folder, ranks, arguments(state))
        iterations.add(str(state.get("iteration")))
        for place in places:
            _add(rank, place, tensors, stored)
    if len(iterations) > 1:
        raise CheckpointError(
            f"The ranks' files in {folder} are of different iterations: "
            f"{some(sorted(iterations))}. Copy the checkpoint again or name another save."
        )
    found = re.fullmatch(r"iter_(\d+)", folder.name)
    iteration = int(found[1]) if found else None
    return LegacyIndex(folder, iteration, tensors, {}, stored, ranks, sizes)


def legacy_common(index: LegacyIndex) -> dict[str, Any]:
    """Return what the first rank saved, as plain values and symbols.

    Raises:
        CheckpointError: the file cannot be read.
    """
    return read_file(index.path / index.ranks[0] / FILE)[0]


def name_of(rank: str, place: Place) -> str:
    """Return the name of a rank's tensor; see ``NOT_MODEL`` for what is not merged."""
    first, *rest = place.path
    name = f"{rank}/{first}/{'.'.join(rest)}"
    if place.is_model:
        return name
    return f"optimizer.{name}" if first == "optimizer" else f"common_state/{name}"


def check_layouts(base: CheckpointIndex, experts: Mapping[str, CheckpointIndex]) -> None:
    """Check that all inputs have one format, and legacy ones the same ranks.

    Raises:
        CheckpointError: names the first that differs from the base.
    """
    for name, expert in experts.items():
        who = f"Expert {name!r} ({expert.path})"
        if isinstance(base, LegacyIndex) != isinstance(expert, LegacyIndex):
            formats = [
                "legacy torch" if isinstance(index, LegacyIndex) else "torch_dist"
                for index in (expert, base)
            ]
            raise CheckpointError(
                f"{who} is in the {formats[0]} format, the base ({base.path}) in {formats[1]}. "
                f"Whichever is in the legacy format, {CONVERT}."
            )
        if not isinstance(base, LegacyIndex) or not isinstance(expert, LegacyIndex):
            continue
        if base.ranks != expert.ranks or base.sizes != expert.sizes:
            raise CheckpointError(
                f"{who} was saved under {layout_of(expert)}, the base under {layout_of(base)}. "
                f"Legacy checkpoints are merged where all share a layout. Of each of them, "
                f"{CONVERT}."
            )


def layout_of(index: LegacyIndex) -> str:
    """Return the parallel sizes for people, such as ``tensor 2, pipeline 1, expert 1``."""
    return ", ".join(f"{axis} {size}" for axis, size in index.sizes.items())


def _ranks(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in folder.iterdir() if _RANK.fullmatch(entry.name)))


def _sizes(folder: Path, ranks: Sequence[str], args: Mapping[str, Any]) -> dict[str, int]:
    """Return the parallel sizes that the arguments tell, checked against the folders' names.

    A name with two numbers may end with a pipeline or an expert rank; only the arguments know.
    """
    told = [args.get(f"{axis}_model_parallel_size", 1) for axis in AXES]
    if not args:  # saved without arguments: before there were MoE experts
        numbers = [[int(n or 0) for n in _RANK.fullmatch(rank).groups()] for rank in ranks]  # type: ignore[union-attr]
        told = [max(column) + 1 for column in zip(*numbers, strict=True)]
    if not all(type(size) is int and size > 0 for size in told) or math.prod(told) > 1 << 20:
        raise CheckpointError(f"{folder}: the arguments name impossible parallel sizes {told}.")
    tensor, pipeline, expert = told
    # With another tensor parallelism for the MoE experts, not every combination is a rank.
    partly = args.get("expert_tensor_parallel_size") not in (None, tensor)
    if partly and expert > 1:
        return dict(zip(AXES, told, strict=True))
    wanted = {
        f"mp_rank_{t:02d}"
        + (f"_{p:03d}" if pipeline > 1 else "")
        + (f"_{e:03d}" if expert > 1 else "")
        for t, p, e in itertools.product(range(tensor), range(pipeline), range(expert))
    }
    sizes = dict(zip(AXES, told, strict=True))
    if wanted != set(ranks):
        lacking, more = sorted(wanted - set(ranks)), sorted(set(ranks) - wanted)
        problems = [f"lacks {some(lacking)}"] if lacking else []
        problems += [f"has {some(more)} beside them"] if more else []
        raise CheckpointError(
            f"{folder} was saved under {', '.join(f'{a} {s}' for a, s in sizes.items())} parallel "
            f"ranks, but {' and '.join(problems)}. Copy the checkpoint again, all of it, or name "
            "another save."
        )
    return sizes


def _add(
    rank: str,
    place: Place,
    tensors: dict[str, TensorEntry],
    stored: dict[tuple[str, int], StoredTensor],
) -> None:
    tensor, name, file = place.stored, name_of(rank, place), f"{rank}/{FILE}"
    span = 0
    if 0 not in tensor.sizes:
        steps = zip(tensor.sizes, tensor.strides, strict=True)
        span = 1 + sum((size - 1) * stride for size, stride in steps)
        if stored.setdefault((file, tensor.position), tensor) != tensor and place.is_model:
            raise CheckpointError(
                f"{file}: {name} shares its elements with a tensor of another shape."
            )
    length = span * DTYPE_BYTES[tensor.dtype]
    origin = (0,) * len(tensor.sizes)
    chunk = Chunk(origin, tensor.sizes, file, tensor.position, length)
    if name in tensors:
        raise CheckpointError(f"{file}: there are two tensors named {name}.")
    tensors[name] = TensorEntry(tensor.sizes, tensor.dtype, (chunk,))
