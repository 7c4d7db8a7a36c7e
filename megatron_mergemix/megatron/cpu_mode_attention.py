"""Attention by torch's fused kernel, for CPU mode.

Megatron's own attention writes all scores down, once for each of mask, softmax and dropout; on GPUs
Transformer Engine takes its place. On a CPU it is a third of a training step of a small model, and
more of a forward pass.
"""

from __future__ import annotations

import functools
from typing import Any


def fuse(dot_product_attention: Any) -> None:
    """Make the attention of this module of Megatron use the fused kernel wherever it says the same.

    That is plain causal attention of tokens to themselves: no mask of the caller's, no cache of
    keys, window, sink or dropout. Elsewhere Megatron's own code runs.
    """
    attention = dot_product_attention.DotProductAttention
    original = attention.forward

    @functools.wraps(original)
    def forward(
        self: Any, query: Any, key: Any, value: Any, attention_mask: Any, *args: Any, **options: Any
    ) -> Any:
        import torch

        others = (attention_mask, *args, *options.values())
        if not (_is_plain(self, query, key) and all(_says_nothing(self, x) for x in others)):
            return original(self, query, key, value, attention_mask, *args, **options)
        repeats = query.size(2) // key.size(2)
        query, key, value = (each.permute(1, 2, 0, 3) for each in (query, key, value))
        if repeats > 1:
            key, value = (each.repeat_interleave(repeats, dim=1) for each in (key, value))
        context = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale
        )
        return context.permute(2, 0, 1, 3).reshape(context.size(2), context.size(0), -1)

    attention.forward = forward


def _says_nothing(attention: Any, argument: Any) -> bool:
    # Megatron goes by the kind of mask that the layer was made with, and not by the one given.
    return argument is None or isinstance(argument, type(attention.attn_mask_type))


def _is_plain(attention: Any, query: Any, key: Any) -> bool:
    softmax = attention.scale_mask_softmax
    dropout = attention.attention_dropout
    return bool(
        attention.attn_mask_type.name == "causal"
        and query.size(0) == key.size(0)
        and softmax.scale is None
        and softmax.window_size is None
        and attention.softmax_offset is None
        and not (dropout.training and dropout.p > 0)
    )
