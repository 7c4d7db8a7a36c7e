"""Write and read torch_dist checkpoints through Megatron's own ``dist_checkpointing``.

A save appears whole or not at all: it is written into a hidden folder beside its final place and
renamed when it is complete. The tracker file follows, so a root written here is what Megatron's
``--load`` expects.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_mergemix.checkpoint.index import is_extra_state
from megatron_mergemix.checkpoint.saves import TRACKER, complete_saves
from megatron_mergemix.files.publishing import publish_text, sync_folder
from megatron_mergemix.megatron.checkpoint_fits import ARCHITECTURE, architecture, check_fits
from megatron_mergemix.processes.distributed import rank

# What Megatron-LM 0.16 and later write and expect. "fully_reshardable" keeps optimizer states
# per parameter, so that a run may continue under another layout.
CONTENT: Mapping[str, Any] = {
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}


def model_state(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Return the sharded state of this rank's model chunks, its tensors aliasing the parameters.

    Keys are ``model``, or ``model0``, ``model1``, ... with virtual pipeline stages, as in
    Megatron-LM.
    """
    from megatron.core import parallel_state

    metadata = {
        **CONTENT,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    return {
        name: unwrap(chunk).sharded_state_dict(metadata=metadata)  # type: ignore[operator]
        for name, chunk in zip(names, chunks, strict=True)
    }


def save(
    root: Path, step: int, chunks: Sequence[torch.nn.Module], training: Mapping[str, Any], keep: int
) -> Path:
    """Collective: write a complete save of ``step`` under ``root`` and return its folder.

    Args:
        root: checkpoint root; made if missing.
        step: iteration number.
        chunks: this rank's model chunks.
        training: further entries of the state (optimizer, scheduler, counters); may be empty.
        keep: how many saves stay; older ones are removed once this one is in place.
    """
    from megatron.core import dist_checkpointing

    final = root / f"iter_{step:07d}"
    building = root / f".building_iter_{step:07d}"
    if rank() == 0:
        for leftover in (final, *root.glob(".building_*"), *root.glob(".removing_*")):
            shutil.rmtree(leftover, ignore_errors=True)  # of a killed save
        building.mkdir(parents=True)
    dist.barrier()
    state = {
        **model_state(chunks),
        **training,
        ARCHITECTURE: architecture(unwrap(chunks[0])),
        "iteration": step,
        "checkpoint_version": 3.0,
    }
    dist_checkpointing.save(state, str(building), content_metadata=dict(CONTENT))
    dist.barrier()
    if rank() == 0:
        os.replace(building, final)
        sync_folder(root)  # older saves go only when this one's name survives a power failure
        point_tracker(root, step)
        _remove_older(root, keep)
    dist.barrier()
    return final


def point_tracker(root: Path, step: int) -> None:
    """Make ``step`` the save that Megatron's ``--load`` takes from ``root``."""
    publish_text(root / TRACKER, str(step))


def load_model(path: Path, chunks: Sequence[torch.nn.Module]) -> None:
    """Collective: read the weights of one save into the live parameters, in place.

    Args:
        path: the iteration's folder; any parallel layout.
        chunks: this rank's model chunks; their parameters keep their storage.

    Raises:
        CheckpointError: the checkpoint is of another model, see :mod:`.checkpoint_fits`, or a file
            is missing or cut off.
    """
    from megatron.core import dist_checkpointing

    state = {name: without_extra_state(chunk) for name, chunk in model_state(chunks).items()}
    check_fits(path, state, architecture(unwrap(chunks[0])))
    loaded = dist_checkpointing.load(state, str(path), strict="assume_ok_unexpected")
    for name, chunk in zip(list(state), chunks, strict=True):
        # Tensors that Megatron saves in pieces (gate and up of swiglu) come back as new ones.
        missing, unexpected = unwrap(chunk).load_state_dict(loaded[name], strict=False)
        wrong = [key for key in missing if not is_extra_state(key)] + unexpected
        assert not wrong, f"Megatron asked for other names than it saves: {wrong}"


def without_extra_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sharded model state without ``_extra_state`` entries.

    They hold scales of fp8, which is not used here. Megatron unpickles them without restriction,
    so a checkpoint from elsewhere could run code. Local and Transformer Engine layers have
    different ones; without them either loads what the other saved.
    """
    return {key: value for key, value in state.items() if not is_extra_state(key)}


def load_training(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Collective: read a save into ``state``, the same shape of dictionary that was saved."""
    from megatron.core import dist_checkpointing

    return dist_checkpointing.load(state, str(path), strict="assume_ok_unexpected")


def unwrap(chunk: torch.nn.Module) -> torch.nn.Module:
    """Return the module inside Megatron's DDP and Float16 wrappers."""
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.transformer.module import Float16Module

    while isinstance(chunk, (DistributedDataParallel, Float16Module)):
        chunk = chunk.module
    return chunk


def sharded_tensors(state: Any) -> Iterable[Any]:
    """Yield Megatron's sharded tensors and tensor factories in a sharded state, in order."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    if isinstance(state, (ShardedTensor, ShardedTensorFactory)):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from sharded_tensors(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from sharded_tensors(value)


def _remove_older(root: Path, keep: int) -> None:
    saves = sorted(complete_saves(root))
    for _, path in saves[: max(0, len(saves) - keep)]:
        # Renamed first: a half-removed save must not look like a save.
        doomed = path.with_name(f".removing_{path.name}")
        os.replace(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
