"""Start the ranks of a built-in job and lay out Megatron's process groups."""

from __future__ import annotations

import logging
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_mergemix.config import Parallel
from megatron_mergemix.errors import MergeMixError
from megatron_mergemix.megatron import cpu_mode, repairs

_PATIENCE = timedelta(minutes=30)
"""Of a collective, until it is an error."""


def start(parallel: Parallel) -> None:
    """Collective: initialise torch.distributed and Megatron's model-parallel groups.

    Reads RANK, WORLD_SIZE, LOCAL_RANK and the rendezvous from the environment as torchrun sets
    them. Backend: gloo in CPU mode, otherwise NCCL for tensors on the GPU and gloo for the rest.

    Raises:
        MergeMixError: there is no CUDA device for this rank and CPU mode is not asked for, or the
            number of ranks is not ``parallel.processes``.
    """
    on_cpu = cpu_mode.wanted()
    if on_cpu:
        cpu_mode.activate()
    elif not torch.cuda.is_available():
        raise MergeMixError(
            "no CUDA device is visible. Set MERGEMIX_DEVICE=cpu to run on the CPU (for trying and "
            "testing), or check the driver and CUDA_VISIBLE_DEVICES."
        )
    else:
        torch.cuda.set_device(_own_device())
    # Megatron logs its whole configuration and deprecations on every start; errors still show.
    logging.getLogger("megatron").setLevel(logging.ERROR)

    if not on_cpu:
        repairs.apply()

    from megatron.core import parallel_state

    if not dist.is_initialized():
        dist.init_process_group(
            backend="gloo" if on_cpu else "cpu:gloo,cuda:nccl",
            timeout=_PATIENCE,
        )
    _check_world_size(parallel)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        expert_model_parallel_size=parallel.expert,
    )


def _own_device() -> int:
    """Return the index of this rank's GPU."""
    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= count:
        raise MergeMixError(
            f"LOCAL_RANK is {index}, but this machine shows {count} CUDA devices, expected one for "
            "each of its ranks. Start fewer ranks here, or check CUDA_VISIBLE_DEVICES."
        )
    return index


def _check_world_size(parallel: Parallel) -> None:
    found = dist.get_world_size()
    if found != parallel.processes:
        raise MergeMixError(
            f"parallel.processes is {parallel.processes}, but {found} ranks were started. Start "
            f"{parallel.processes} ranks over all machines, or set parallel.processes to {found}."
        )
