"""Forward-only scoring of token sequences under any parallel layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_mergemix.megatron.device import device
from megatron_mergemix.megatron.replicas import DataRanks, all_data_ranks


def sequence_losses(
    chunks: Sequence[torch.nn.Module],
    sequences: torch.Tensor,
    micro_batch_size: int,
    data_ranks: DataRanks | None = None,
) -> torch.Tensor:
    """Return the summed negative log-likelihood of each sequence in nats.

    Collective: every rank passes the same sequences and gets the same result. Whole micro-batches
    are dealt out to the data-parallel ranks, so that what is in one, and with it every bit of a
    dense model's losses, does not depend on how many ranks there are. Each rank runs the same
    number of micro-batches, which MoE experts spread over ranks rely on.

    Args:
        chunks: this rank's model chunks.
        sequences: int64 ``[N, S + 1]`` on the CPU; token 0 is only context.
        micro_batch_size: sequences per forward pass.
        data_ranks: the data-parallel ranks that score these sequences; None for all.

    Returns:
        float64 ``[N]`` on the CPU.
    """
    return token_losses(chunks, sequences, micro_batch_size, data_ranks, summed=True)


def token_losses(
    chunks: Sequence[torch.nn.Module],
    sequences: torch.Tensor,
    micro_batch_size: int,
    data_ranks: DataRanks | None = None,
    *,
    summed: bool = False,
) -> torch.Tensor:
    """Return the negative log-likelihood of every token in nats; see :func:`sequence_losses`.

    Returns:
        float64 ``[N, S]`` on the CPU, or ``[N]`` where it is summed over each sequence.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    data_ranks = data_ranks or all_data_ranks()
    mine, num_microbatches = rows_of_this_rank(
        len(sequences), micro_batch_size, len(chunks), data_ranks
    )
    # Virtual pipeline stages take turns, so that each walks through the batches by itself.
    batches = [micro_batches(sequences[mine], micro_batch_size) for _ in chunks]
    with in_eval_mode(chunks), torch.no_grad():
        collected = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, summed),
            data_iterator=batches if len(chunks) > 1 else batches[0],
            model=list(chunks),
            num_microbatches=num_microbatches,
            seq_length=sequences.shape[1] - 1,
            micro_batch_size=micro_batch_size,
            forward_only=True,
            collect_non_loss_data=True,
        )

    shape = (len(mine),) if summed else (len(mine), sequences.shape[1] - 1)
    local = torch.zeros(shape, dtype=torch.float64, device=device())
    if parallel_state.is_pipeline_last_stage():
        local = torch.cat(collected)
    return gathered(local, data_ranks).cpu()[: len(sequences)]


@contextmanager
def in_eval_mode(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Switch dropout off for the block."""
    training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, was_training in zip(chunks, training, strict=True):
            chunk.train(was_training)


def gathered(local: torch.Tensor, data_ranks: DataRanks) -> torch.Tensor:
    """Collective: return the losses of all data-parallel ranks, from their last stages."""
    from megatron.core import parallel_state

    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(
            local,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    if data_ranks.size == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(data_ranks.size)]
    dist.all_gather(parts, local, group=data_ranks.group)
    return torch.cat(parts)


def rows_of_this_rank(
    num_sequences: int, micro_batch_size: int, num_chunks: int, data_ranks: DataRanks
) -> tuple[torch.Tensor, int]:
    """Return this data-parallel rank's rows, padded by repeating the last one, and its batches.

    With virtual pipeline stages Megatron wants a multiple of the stages.
    """
    from megatron.core import parallel_state

    num_microbatches = -(-num_sequences // (micro_batch_size * data_ranks.size))
    if num_chunks > 1:
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        num_microbatches = -(-num_microbatches // stages) * stages
    per_rank = num_microbatches * micro_batch_size
    start = data_ranks.own * per_rank
    rows = torch.arange(start, start + per_rank).clamp(max=num_sequences - 1)
    return rows, num_microbatches


def micro_batches(
    sequences: torch.Tensor, micro_batch_size: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield ``{"tokens", "labels", "position_ids"}``, int64, each ``[micro_batch_size, S]``."""
    position_ids = torch.arange(sequences.shape[1] - 1, device=device())
    for batch in sequences.split(micro_batch_size):
        batch = batch.to(device(), torch.int64)
        yield {
            "tokens": batch[:, :-1].contiguous(),
            "labels": batch[:, 1:].contiguous(),
            "position_ids": position_ids.expand(len(batch), -1),
        }


def _forward_step(
    summed: bool, batches: Iterator[dict[str, torch.Tensor]], chunk: torch.nn.Module
) -> Any:
    batch = next(batches)
    output = chunk(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    def collected(losses: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
        return losses.double().sum(dim=1) if summed else losses.double()

    return output, collected
