"""What scoring takes of a GPU beside the weights: measured, before base and experts fill it.

Activations depend on fused kernels, recomputation and layouts that no formula follows, and logits
of a large vocabulary may outweigh them. One pass says it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from megatron_mergemix.megatron import kv_cache
from megatron_mergemix.megatron.device import device
from megatron_mergemix.megatron.dist_checkpoint import unwrap
from megatron_mergemix.megatron.gradient import backward, main_gradients
from megatron_mergemix.megatron.replicas import all_data_ranks
from megatron_mergemix.megatron.scoring import sequence_losses


def scoring_bytes(
    chunks: Sequence[torch.nn.Module],
    micro_batch_size: int,
    length: int,
    *,
    differentiates: bool = False,
    kept_tokens: int = 0,
) -> int:
    """Collective: return the bytes of this rank's device that scoring takes beside the weights.

    Args:
        chunks: this rank's model chunks, whatever their weights.
        micro_batch_size: windows per pass.
        length: tokens of a window.
        differentiates: whether there are backward passes too, and gradients.
        kept_tokens: of every text in a micro-batch, of which keys and values are kept.
    """
    kept = kv_cache.cache_bytes(chunks, micro_batch_size, kept_tokens) if kept_tokens else 0
    a_pass = partial(one_pass, chunks, micro_batch_size, length, differentiates)
    return kept + _peak(device(), a_pass)


def one_pass(
    chunks: Sequence[torch.nn.Module], micro_batch_size: int, length: int, differentiates: bool
) -> None:
    """Collective: run as many full micro-batches on every replica as can be under way at once."""
    from megatron.core import parallel_state

    under_way = parallel_state.get_pipeline_model_parallel_world_size()
    if len(chunks) > 1:
        under_way *= 2  # interleaved stages begin up to twice as many before the first is done
    count = under_way * micro_batch_size * all_data_ranks().size
    # Tokens of all kinds, so that a router spreads them over its experts.
    model: Any = unwrap(chunks[0])
    tokens = torch.arange(count * (length + 1)).reshape(count, -1) % model.vocab_size
    if differentiates:
        with main_gradients(chunks):
            backward(chunks, tokens, torch.ones(count), micro_batch_size)
    else:
        sequence_losses(chunks, tokens, micro_batch_size)


def _peak(device: torch.device, run: Callable[[], None]) -> int:
    """Return the most that the device held at once, above what it held before.

    0 on the CPU, which keeps no such count, and whose memory is not filled to the brim.
    """
    if device.type == "cpu":
        return 0
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before
