"""Greedy decoding under any parallel layout, by a whole forward pass for every token.

Megatron Core has engines that keep keys and values (``megatron.core.inference``), but they need
CUDA throughout: the static engine sets and asks for CUDA devices, the dynamic one allocates its
blocks, streams and events there, and both want the logits of the whole vocabulary gathered. They
also decode one replica's requests by a scheduler of their own, where a search divides ranks among
candidates. So a prompt costs as many forward passes as it gets tokens; prompts that are done drop
out, and those that remain share full micro-batches. Prefer tasks whose answers are scored to tasks
whose answers are written: they have less noise besides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megatron_mergemix.errors import EvaluationError
from megatron_mergemix.evaluate.continuations import Prompt, Request, prepare
from megatron_mergemix.megatron.continuations import most_likely_tokens
from megatron_mergemix.megatron.replicas import DataRanks


def generate(
    chunks: Sequence[torch.nn.Module],
    prompts: Sequence[Prompt],
    is_done: Callable[[int, Sequence[int]], bool],
    micro_batch_size: int,
    vocab_size: int,
    data_ranks: DataRanks | None = None,
) -> list[list[int]]:
    """Return the tokens that follow every prompt; see :meth:`.evaluate.proxy.Proxy.generate`.

    Collective, over the data-parallel ranks in ``data_ranks`` (None for all) and the model-parallel
    ranks of each. Every rank keeps all texts, so that all agree on who goes on.
    """
    new: list[list[int]] = [[] for _ in prompts]
    active = [number for number, prompt in enumerate(prompts) if prompt.max_new_tokens > 0]
    longest = max((len(prompt.tokens) + prompt.max_new_tokens for prompt in prompts), default=0)
    while active:
        asked = prepare(
            [Request((*prompts[n].tokens, *new[n]), (0,)) for n in active],
            max_length=longest,
            micro_batch_size=micro_batch_size,
            vocab_size=vocab_size,
        )
        tokens = most_likely_tokens(chunks, asked, data_ranks).tolist()
        if min(tokens) < 0:
            raise EvaluationError(
                "the logits are not finite while an answer is generated; the merged model is "
                "broken for these merge weights."
            )
        for number, token in zip(active, tokens, strict=True):
            new[number].append(token)
        active = [
            number
            for number in active
            if len(new[number]) < prompts[number].max_new_tokens
            and not is_done(number, new[number])
        ]
    return new
