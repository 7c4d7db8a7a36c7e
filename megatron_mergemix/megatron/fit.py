"""Does a checkpoint hold the model that is live? Names, shapes, dtypes and what none of them show.

Megatron loads what it is asked for and leaves the rest. A checkpoint of another architecture would
load without a word, and every score after that would be wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_mergemix.checkpoint.checks import check_intact
from megatron_mergemix.checkpoint.index import TensorEntry
from megatron_mergemix.checkpoint.metadata import read_index
from megatron_mergemix.distributed import together, world_size
from megatron_mergemix.errors import CheckpointError

_PRECISION = {"float32": "fp32", "bfloat16": "bf16"}


def check_fits(path: Path, state: Mapping[str, Any]) -> None:
    """Collective: check that a checkpoint has the tensors of the live model, and no others.

    Args:
        path: the iteration's folder.
        state: sharded state of this rank's model chunks, by chunk.

    Raises:
        CheckpointError: a file is missing or cut off, or names, shapes or dtypes differ.
    """
    wanted = _requested(state)
    everywhere = _on_any_rank(tensor.key for tensor in wanted)
    with together():
        index = read_index(path)
        check_intact(index)
        stored = index.model_tensors()
        problems = _shape_problems(wanted, stored)
        problems += [
            f"{key} is in the checkpoint only" for key in stored if key not in everywhere
        ] + _dtype_problems(wanted, stored)
        _refuse(path, problems)


def _requested(state: Mapping[str, Any]) -> list[Any]:
    """Return the tensors that this rank asks the checkpoint for."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    probe = {name: dict(chunk) for name, chunk in state.items()}
    apply_factories(probe)
    return [value for value in nested_values(probe) if isinstance(value, ShardedTensor)]


def _on_any_rank(keys: Iterable[str]) -> set[str]:
    """Collective: return the union; pipeline stages and expert ranks ask for different names."""
    here = sorted(set(keys))
    if world_size() == 1:
        return set(here)
    everywhere: list[list[str]] = [[] for _ in range(world_size())]
    dist.all_gather_object(everywhere, here)
    return {key for keys in everywhere for key in keys}


def _shape_problems(wanted: Iterable[Any], stored: Mapping[str, TensorEntry]) -> list[str]:
    problems = []
    for tensor in wanted:
        shape = tuple(tensor.global_shape)
        if tensor.key not in stored:
            problems.append(f"{tensor.key} is missing")
        elif tuple(stored[tensor.key].shape) != shape and not tensor.allow_shape_mismatch:
            problems.append(f"{tensor.key} is {stored[tensor.key].shape}, the model has {shape}")
        elif tensor.allow_shape_mismatch and stored[tensor.key].shape[0] != shape[0]:
            problems.append(
                f"{tensor.key} has {stored[tensor.key].shape[0]} vocabulary rows, the model "
                f"{shape[0]}: set model.make_vocab_size_divisible_by as the checkpoint had it"
            )
    return problems


def _dtype_problems(wanted: Iterable[Any], stored: Mapping[str, TensorEntry]) -> list[str]:
    """Return one problem per pair of dtypes: converted weights would not be what was saved."""
    keys: dict[tuple[str, str], list[str]] = {}
    for tensor in wanted:
        if tensor.key in stored:
            pair = (stored[tensor.key].dtype, str(tensor.dtype).removeprefix("torch."))
            if pair[0] != pair[1]:
                keys.setdefault(pair, []).append(tensor.key)
    problems = []
    for (theirs, ours), named in keys.items():
        advice = (
            f"set model.precision to {_PRECISION[theirs]}"
            if theirs in _PRECISION
            else "convert the checkpoint to float32 or bfloat16"
        )
        problems.append(
            f"{len(set(named))} tensors such as {named[0]} are {theirs}, the model has {ours}: "
            f"{advice}"
        )
    return problems


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"checkpoint {path} does not fit the model: {'; '.join(problems[:5])}{more}. "
            "The model section must describe the model that was saved."
        )
