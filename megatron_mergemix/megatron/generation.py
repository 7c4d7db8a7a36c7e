"""Greedy decoding under any parallel layout.

Megatron Core has engines that decode (``megatron.core.inference``), but they need CUDA throughout:
the static engine sets and asks for CUDA devices, the dynamic one allocates its blocks, streams and
events there, and both want the logits of the whole vocabulary gathered. They also decode one
replica's requests by a scheduler of their own, where a search divides ranks among candidates. What
they keep keys and values in is taken from them where it serves (:mod:`.decoding`): a token then
costs a pass over itself. Elsewhere it costs a pass over the whole text; prompts that are done drop
out, and those that remain share full micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_mergemix.errors import EvaluationError
from megatron_mergemix.evaluate.continuations import Prompt, Request, prepare
from megatron_mergemix.megatron import decoding, kv_cache
from megatron_mergemix.megatron.continuations import continuation_log_probs, most_likely_tokens
from megatron_mergemix.megatron.dist_checkpoint import unwrap
from megatron_mergemix.megatron.replicas import DataRanks, all_data_ranks
from megatron_mergemix.megatron.trust import Trust, Trusted

_TIE, _TIE_IN_HALF = 0.01, 0.5
"""By how much, in nats, a token may be behind the most likely one by rounding; the latter where
parameters have 16 bits: a logit of 16 then comes in steps of 0.125, and a text sums many layers."""

_trusted = Trusted()


def generate(
    chunks: Sequence[torch.nn.Module],
    prompts: Sequence[Prompt],
    is_done: decoding.IsDone,
    micro_batch_size: int,
    vocab_size: int,
    data_ranks: DataRanks | None = None,
) -> list[list[int]]:
    """Return the tokens that follow every prompt; see :meth:`.evaluate.proxy.Proxy.generate`.

    Collective, over the data-parallel ranks in ``data_ranks`` (None for all) and the model-parallel
    ranks of each.

    Raises:
        EvaluationError: on all of them, where the logits are not finite.
    """
    data_ranks = data_ranks or all_data_ranks()
    how = micro_batch_size, vocab_size, data_ranks
    trust = _trusted.agreed(chunks, kv_cache.serves(chunks), data_ranks)
    if trust is Trust.RIGHT:
        new = decoding.generate(chunks, prompts, is_done, *how)
    elif trust is Trust.UNTRIED:
        new = _tried(chunks, prompts, is_done, *how)
    else:
        new = by_whole_passes(chunks, prompts, is_done, *how)
    if new is None:
        raise EvaluationError(
            "the logits are not finite while an answer is generated; this model is broken (a "
            "merge by its merge weights)."
        )
    return new


def _tried(
    chunks: Sequence[torch.nn.Module],
    prompts: Sequence[Prompt],
    is_done: decoding.IsDone,
    micro_batch_size: int,
    vocab_size: int,
    data_ranks: DataRanks,
) -> list[list[int]] | None:
    """Collective: generate from a KV cache, and by whole passes where that is seen to be wrong."""
    how = micro_batch_size, vocab_size, data_ranks
    new = decoding.generate(chunks, prompts, is_done, *how)
    if new is not None and not any(new):
        return new  # nothing to compare
    wrong = "gives no finite logits" if new is None else _unlike(chunks, prompts, new, *how)
    if not wrong:
        _trusted.settle(chunks, "", data_ranks)
        return new
    whole = by_whole_passes(chunks, prompts, is_done, *how)
    if new is None and whole is None:
        return None  # the model itself is broken, and says nothing about its keys
    told = (
        f"generating from a KV cache {wrong}, where whole passes do not, so that every token costs"
    )
    _trusted.settle(chunks, f"{told} a pass over its whole text.", data_ranks)
    return whole


def _unlike(
    chunks: Sequence[torch.nn.Module],
    prompts: Sequence[Prompt],
    new: Sequence[Sequence[int]],
    micro_batch_size: int,
    vocab_size: int,
    data_ranks: DataRanks,
) -> str:
    """Collective: compare the last tokens of the shortest and longest texts with whole passes.

    Returns:
        How they differ; empty where no whole pass finds another token more likely by more than
        what rounding may do. In 16 bits an eighth of the texts may: there a text that is read at
        once may take other MoE experts than one that is read token by token.
    """
    some = [number for number, tokens in enumerate(new) if tokens]
    some.sort(key=lambda number: len(prompts[number].tokens) + len(new[number]))
    half = -(-micro_batch_size * data_ranks.size // 2)
    some = some if len(some) <= 2 * half else [*some[:half], *some[-half:]]
    before = [(*prompts[number].tokens, *new[number][:-1]) for number in some]
    sizes = {
        "max_length": 1 + max(map(len, before)),
        "micro_batch_size": micro_batch_size,
        "vocab_size": vocab_size,
    }
    contexts = prepare([Request(text, (0,)) for text in before], **sizes)
    tokens = most_likely_tokens(chunks, contexts, data_ranks).tolist()
    pairs = [
        Request(text, (token,))
        for number, text, whole in zip(some, before, tokens, strict=True)
        if whole != new[number][-1]
        for token in (whole, new[number][-1])
    ]
    if not pairs:
        return ""
    log_probs, _ = continuation_log_probs(chunks, prepare(pairs, **sizes), data_ranks)
    model: Any = unwrap(chunks[0])
    is_exact = model.config.params_dtype == torch.float32
    tie, most = (_TIE, 0) if is_exact else (_TIE_IN_HALF, len(some) // 8)
    is_tie = log_probs[0::2] - log_probs[1::2] <= tie  # not so where one is no number
    wrong = int((~is_tie).sum())
    return f"ends {wrong} of {len(some)} answers with another token" if wrong > most else ""


def by_whole_passes(
    chunks: Sequence[torch.nn.Module],
    prompts: Sequence[Prompt],
    is_done: decoding.IsDone,
    micro_batch_size: int,
    vocab_size: int,
    data_ranks: DataRanks,
) -> list[list[int]] | None:
    """Collective: return what :func:`generate` does, None where the logits are not finite.

    Every rank keeps all texts, so that all agree on who goes on.
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
            return None
        for number, token in zip(active, tokens, strict=True):
            new[number].append(token)
        active = [
            number
            for number in active
            if len(new[number]) < prompts[number].max_new_tokens
            and not is_done(number, new[number])
        ]
    return new
