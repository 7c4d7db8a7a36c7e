"""Forward-only scoring of token sequences under any parallel layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_mergemix.megatron import parallel as ranks


def sequence_losses(
    chunks: Sequence[torch.nn.Module], sequences: torch.Tensor, micro_batch_size: int
) -> torch.Tensor:
    """Return the summed negative log-likelihood of each sequence in nats.

    Collective: every rank passes the same sequences and gets the same result. The sequences are
    split over the data-parallel ranks; each rank runs the same number of micro-batches, which
    MoE experts spread over ranks rely on.

    Args:
        chunks: this rank's model chunks.
        sequences: int64 ``[N, S + 1]`` on the CPU; token 0 is only context.
        micro_batch_size: sequences per forward pass.

    Returns:
        float64 ``[N]`` on the CPU.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    data_ranks = parallel_state.get_data_parallel_world_size()
    mine, num_microbatches = _rows_of_this_rank(len(sequences), micro_batch_size, len(chunks))
    # Virtual pipeline stages take turns, so that each walks through the batches by itself.
    batches = [_micro_batches(sequences[mine], micro_batch_size) for _ in chunks]
    training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        collected = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=batches if len(chunks) > 1 else batches[0],
            model=list(chunks),
            num_microbatches=num_microbatches,
            seq_length=sequences.shape[1] - 1,
            micro_batch_size=micro_batch_size,
            forward_only=True,
            collect_non_loss_data=True,
        )
    for chunk, was_training in zip(chunks, training, strict=True):
        chunk.train(was_training)

    local = torch.zeros(len(mine), dtype=torch.float64, device=ranks.device())
    if parallel_state.is_pipeline_last_stage():
        local = torch.cat(collected)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(
            local,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    if data_ranks > 1:
        parts = [torch.empty_like(local) for _ in range(data_ranks)]
        dist.all_gather(parts, local, group=parallel_state.get_data_parallel_group())
        local = torch.cat(parts)
    return local.cpu()[: len(sequences)]


def _rows_of_this_rank(
    num_sequences: int, micro_batch_size: int, num_chunks: int
) -> tuple[torch.Tensor, int]:
    """Return this data-parallel rank's rows, padded by repeating the last one, and its batches.

    With virtual pipeline stages Megatron wants a multiple of the stages.
    """
    from megatron.core import parallel_state

    data_ranks = parallel_state.get_data_parallel_world_size()
    num_microbatches = -(-num_sequences // (micro_batch_size * data_ranks))
    if num_chunks > 1:
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        num_microbatches = -(-num_microbatches // stages) * stages
    per_rank = num_microbatches * micro_batch_size
    start = parallel_state.get_data_parallel_rank() * per_rank
    rows = torch.arange(start, start + per_rank).clamp(max=num_sequences - 1)
    return rows, num_microbatches


def _micro_batches(
    sequences: torch.Tensor, micro_batch_size: int
) -> Iterator[dict[str, torch.Tensor]]:
    position_ids = torch.arange(sequences.shape[1] - 1, device=ranks.device())
    for batch in sequences.split(micro_batch_size):
        batch = batch.to(ranks.device(), torch.int64)
        yield {
            "tokens": batch[:, :-1].contiguous(),
            "labels": batch[:, 1:].contiguous(),
            "position_ids": position_ids.expand(len(batch), -1),
        }


def _forward_step(batches: Iterator[dict[str, torch.Tensor]], chunk: torch.nn.Module) -> Any:
    batch = next(batches)
    output = chunk(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    def summed(losses: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
        return losses.double().sum(dim=1)

    return output, summed
