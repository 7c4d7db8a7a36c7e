"""Keys and values that attention keeps, so that a pass goes on from another one.

Megatron's attention keeps them in a ``StaticInferenceContext``, one per micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right

from megatron_mergemix.megatron.dist_checkpoint import unwrap

_POSITIONS = ("rope", "learned_absolute", "none")
_OTHERWISE = (
    *("window_size", "multi_latent_attention", "experimental_attention_variant"),
    *("fp8", "fp4", "mtp_num_layers", "flash_decode", "enable_cuda_graph"),
    "fused_single_qkv_rope",
)
"""Settings of Megatron's configuration with which attention or products go another way."""


def serves(chunks: Sequence[torch.nn.Module]) -> bool:
    """Return whether this rank's layers are known to go on, token by token, from what they kept.

    Not where a token would need to see others than all before it or is multiplied in fp8, where one
    token alone cannot be cut over ranks, and with virtual pipeline stages.
    """
    model: Any = unwrap(chunks[0])
    return _keeps(chunks) and not model.config.sequence_parallel


def serves_many_tokens(chunks: Sequence[torch.nn.Module]) -> bool:
    """Return whether several tokens at once can go on from what this rank's layers kept.

    As :func:`serves`, but for tokens that can be cut over ranks, and a softmax that torch knows.
    """
    model: Any = unwrap(chunks[0])
    return _keeps(chunks) and getattr(model.config, "softmax_type", "vanilla") == "vanilla"


def _keeps(chunks: Sequence[torch.nn.Module]) -> bool:
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.attention import SelfAttention

    model: Any = unwrap(chunks[0])
    if len(chunks) > 1 or type(model) is not GPTModel:
        return False
    config = model.config
    return (
        not any(getattr(config, name, None) for name in _OTHERWISE)
        and config.context_parallel_size == 1
        and getattr(config, "cuda_graph_impl", "none") == "none"
        and model.position_embedding_type in _POSITIONS
        and all(type(layer.self_attention) is SelfAttention for layer in model.decoder.layers)
    )


def at_once() -> int:
    """Return of how many micro-batches keys are kept at once: twice the pipeline stages, so that
    stages wait for each other a third of the time at most.
    """
    from megatron.core import parallel_state

    stages: int = parallel_state.get_pipeline_model_parallel_world_size()
    return 1 if stages == 1 else 2 * stages


def cache_bytes(chunks: Sequence[torch.nn.Module], micro_batch_size: int, length: int) -> int:
    """Return the bytes that this rank keeps at once for texts of a length; 0 where it cannot."""
    if not _keeps(chunks):
        return 0
    model: Any = unwrap(chunks[0])
    attentions = [layer.self_attention for layer in model.decoder.layers]
    elements = sum(
        2 * attention.num_query_groups_per_partition * attention.hidden_size_per_attention_head
        for attention in attentions
    )
    return int(
        at_once() * micro_batch_size * length * elements * model.config.params_dtype.itemsize
    )


def empty(num_texts: int, longest: int) -> Any:
    """Return a cache for as many texts, which keeps nothing yet."""
    from megatron.core.inference.contexts import StaticInferenceContext

    cache: Any = StaticInferenceContext(num_texts, longest)
    # What is picked is picked by us. Megatron Core 0.17 reads it from a configuration.
    holder: Any
    for holder in (cache, getattr(cache, "config", None)):
        if hasattr(holder, "materialize_only_last_token_logits"):
            holder.materialize_only_last_token_logits = False
    return cache


@contextmanager
def many_tokens_go_on(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Let passes within the block be over any number of tokens behind what is kept.

    Behind kept keys Megatron lets every token see all others, which is right for one alone: it
    decodes. Torch's attention takes its place, where tokens see what is before them.
    """
    model: Any = unwrap(chunks[0])
    attentions = [layer.self_attention.core_attention for layer in model.decoder.layers]
    for attention in attentions:
        attention.forward = partial(_attend, model.config.softmax_scale)
    try:
        yield
    finally:
        for attention in attentions:
            del attention.forward


def _attend(
    scale: float | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *_: object,
    **__: object,
) -> torch.Tensor:
    """Return ``[S, B, H]`` of queries ``[S, B, heads, D]``, the last ones among the keys."""
    repeats = query.size(2) // key.size(2)
    query, key, value = (each.permute(1, 2, 0, 3) for each in (query, key, value))
    if repeats > 1:
        key, value = (each.repeat_interleave(repeats, dim=1) for each in (key, value))
    mask: Any = causal_lower_right(query.size(2), key.size(2))
    found = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    return found.permute(2, 0, 1, 3).flatten(2).contiguous()
