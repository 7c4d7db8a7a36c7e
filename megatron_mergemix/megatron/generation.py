"""Greedy decoding under any parallel layout.

Megatron Core has engines that decode (``megatron.core.inference``), but they need CUDA throughout:
the static engine sets and asks for CUDA devices, the dynamic one allocates its blocks, streams and
events there, and both want the logits of the whole vocabulary gathered. They also decode one
replica's requests by a scheduler of their own, where a search divides ranks among candidates. What
they keep keys and values in is taken from them where it serves (:mod:`.kept_keys`): a token then
costs a pass over itself. Elsewhere it costs a pass over the whole text; prompts that are done drop
out, and those that remain share full micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch

from megatron_mergemix.distributed import rank
from megatron_mergemix.errors import EvaluationError
from megatron_mergemix.evaluate.continuations import Prompt, Request, prepare
from megatron_mergemix.megatron import kept_keys
from megatron_mergemix.megatron.continuations import most_likely_tokens
from megatron_mergemix.megatron.replicas import DataRanks, all_data_ranks

_are_right: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()
"""Models whose kept keys were tried."""


def generate(
    chunks: Sequence[torch.nn.Module],
    prompts: Sequence[Prompt],
    is_done: kept_keys.IsDone,
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
    keeps = _are_right.get(chunks[0], True) and kept_keys.serve(chunks, data_ranks)
    new = (kept_keys.generate if keeps else by_whole_passes)(chunks, prompts, is_done, *how)
    if keeps and new is not None and chunks[0] not in _are_right:
        _are_right[chunks[0]] = _end_alike(chunks, prompts, new, *how)
        if not _are_right[chunks[0]]:
            new = by_whole_passes(chunks, prompts, is_done, *how)
    if new is None:
        raise EvaluationError(
            "the logits are not finite while an answer is generated; the merged model is broken "
            "for these merge weights."
        )
    return new


def _end_alike(
    chunks: Sequence[torch.nn.Module],
    prompts: Sequence[Prompt],
    new: Sequence[Sequence[int]],
    micro_batch_size: int,
    vocab_size: int,
    data_ranks: DataRanks,
) -> bool:
    """Collective: say whether a whole pass over some texts gives most of their last tokens, too.

    Near ties may differ. Kernels that Megatron's attention calls are not the same on all machines,
    so that kept keys are tried once per model; where they are wrong, that is said.
    """
    some = [number for number, tokens in enumerate(new) if tokens]
    some = some[: micro_batch_size * data_ranks.size]
    if not some:
        return True
    asked = prepare(
        [Request((*prompts[n].tokens, *new[n][:-1]), (0,)) for n in some],
        max_length=max(len(prompts[n].tokens) + len(new[n]) for n in some),
        micro_batch_size=micro_batch_size,
        vocab_size=vocab_size,
    )
    tokens = most_likely_tokens(chunks, asked, data_ranks).tolist()
    same = sum(new[number][-1] == token for number, token in zip(some, tokens, strict=True))
    if 2 * same >= len(some):
        return True
    if rank() == 0:
        print(
            f"warning: with kept keys and values {len(some) - same} of {len(some)} answers end "
            "with another token than without, so that every token costs a pass over its whole "
            "text. This is a bug of megatron-mergemix or of a library; please report it.",
            flush=True,
        )
    return False


def by_whole_passes(
    chunks: Sequence[torch.nn.Module],
    prompts: Sequence[Prompt],
    is_done: kept_keys.IsDone,
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
