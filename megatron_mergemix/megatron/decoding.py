"""Greedy decoding from a KV cache: one pass over a text, then one over each new token.

Prompts are sorted by length and dealt out to the data-parallel ranks in waves of as many
micro-batches as :func:`.kv_cache.at_once` says, so that what is in one, and with it every bit of a
dense model's logits, does not depend on how many ranks there are. All texts of a wave are read up
to the length of its shortest prompt at once, and from there on token by token: where a prompt goes
on its own tokens are taken, behind its end the most likely ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron_mergemix.evaluate.continuations import Prompt
from megatron_mergemix.megatron import kv_cache
from megatron_mergemix.megatron.device import device
from megatron_mergemix.megatron.dist_checkpoint import unwrap
from megatron_mergemix.megatron.logits import Batch
from megatron_mergemix.megatron.passes import Step, run_together
from megatron_mergemix.megatron.replicas import DataRanks
from megatron_mergemix.megatron.scoring import gathered, in_eval_mode

IsDone = Callable[[int, Sequence[int]], bool]
"""Says of a prompt, by its number, whether what was written behind it is a whole answer."""

_COPY = -1


@dataclass
class _Text:
    """One prompt and what was written behind it.

    Attributes:
        number: of the prompt; :data:`_COPY` where the text only fills up a micro-batch.
        prompt: its tokens, and how many may follow.
        new: what followed.
        goes_on: whether more is to follow.
        is_broken: whether the logits behind it were not finite.
    """

    number: int
    prompt: Prompt
    new: list[int] = field(default_factory=list)
    goes_on: bool = True
    is_broken: bool = False

    def token_at(self, place: int) -> int:
        """Return the token at a place; what is behind the end of the text is of no matter."""
        length = len(self.prompt.tokens)
        if place < length:
            return int(self.prompt.tokens[place])
        return self.new[place - length] if place - length < len(self.new) else 0

    def take(self, token: int, place: int, is_done: IsDone) -> None:
        """Take the most likely token for a place, if the text goes on there."""
        if not self.goes_on or place < len(self.prompt.tokens):
            return
        if token < 0:
            self.is_broken, self.goes_on = True, False
            return
        self.new.append(token)
        is_full = len(self.new) >= self.prompt.max_new_tokens
        self.goes_on = not (is_full or is_done(self.number, self.new))


def generate(
    chunks: Sequence[torch.nn.Module],
    prompts: Sequence[Prompt],
    is_done: IsDone,
    micro_batch_size: int,
    vocab_size: int,
    data_ranks: DataRanks,
) -> list[list[int]] | None:
    """Collective: return the tokens that follow every prompt, None where logits are not finite.

    As :func:`.generation.generate`, where :func:`.kv_cache.serves` on every rank.
    """
    asked = [number for number, prompt in enumerate(prompts) if prompt.max_new_tokens > 0]
    if not asked:
        return [[] for _ in prompts]
    asked.sort(key=lambda number: (-len(prompts[number].tokens), number))
    at_once = kv_cache.at_once()
    waves = [
        [
            [_Text(n, prompts[asked[-1] if n == _COPY else n], goes_on=n != _COPY) for n in batch]
            for batch in wave
        ]
        for wave in _dealt_out(asked, micro_batch_size, at_once, data_ranks)
    ]
    with in_eval_mode(chunks), torch.no_grad():
        for wave in waves:
            _write(chunks, wave, is_done, vocab_size, data_ranks)
    mine = [text for wave in waves for batch in wave for text in batch]
    return _all_texts(mine, prompts, data_ranks)


def _dealt_out(
    numbers: Sequence[int], micro_batch_size: int, at_once: int, data_ranks: DataRanks
) -> list[list[list[int]]]:
    """Return this rank's waves of micro-batches, every so many one, filled up with copies.

    Each rank gets as many, which MoE experts spread over ranks rely on.
    """
    size = micro_batch_size * at_once
    filled = [*numbers, *[_COPY] * (-len(numbers) % (size * data_ranks.size))]
    waves = [
        [
            filled[first : first + micro_batch_size]
            for first in range(start, start + size, micro_batch_size)
        ]
        for start in range(0, len(filled), size)
    ]
    return waves[data_ranks.own :: data_ranks.size]


def _write(
    chunks: Sequence[torch.nn.Module],
    wave: Sequence[Sequence[_Text]],
    is_done: IsDone,
    vocab_size: int,
    data_ranks: DataRanks,
) -> None:
    """Collective: write the texts of a wave to their ends."""
    texts = [text for batch in wave for text in batch]
    longest = max(len(text.prompt.tokens) + text.prompt.max_new_tokens for text in texts)
    kept = [kv_cache.empty(len(batch), longest) for batch in wave]
    first, end = 0, _least(min(len(text.prompt.tokens) for text in texts), chunks, data_ranks)
    while _anyone(any(text.goes_on for text in texts), chunks, data_ranks):
        steps = [
            Step(_batch(batch, first, end), first, cache)
            for batch, cache in zip(wave, kept, strict=True)
        ]
        for text, token in zip(texts, _next_tokens(chunks, steps, vocab_size), strict=True):
            text.take(token, end, is_done)
        first = min(end, longest - 1)  # a rank that is done goes along with the others
        end = first + 1


def _batch(texts: Sequence[_Text], first: int, end: int) -> Batch:
    """Return the texts' tokens from one place to another; what follows the last is asked for."""
    tokens = [[text.token_at(place) for place in range(first, end)] for text in texts]
    rows = torch.arange(len(texts))
    last = torch.full_like(rows, end - first - 1)
    return Batch(torch.tensor(tokens, dtype=torch.int64), rows, last, rows, torch.zeros_like(rows))


def _least(length: int, chunks: Sequence[torch.nn.Module], data_ranks: DataRanks) -> int:
    """Collective: return the least of the lengths where ranks must go along with each other."""
    return -_largest(-length, chunks, data_ranks)


def _anyone(goes_on: bool, chunks: Sequence[torch.nn.Module], data_ranks: DataRanks) -> bool:
    """Collective: return whether this rank, or one that it must go along with, goes on."""
    return bool(_largest(int(goes_on), chunks, data_ranks))


def _largest(value: int, chunks: Sequence[torch.nn.Module], data_ranks: DataRanks) -> int:
    """Collective: return the largest of all data-parallel ranks' values; of a dense model, its own.

    MoE experts that are spread over ranks get the tokens of all of them in every pass.
    """
    config: Any = unwrap(chunks[0]).config
    if data_ranks.size == 1 or config.num_moe_experts is None:
        return value
    largest = torch.tensor(value, device=device())
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=data_ranks.group)
    return int(largest.item())


def _next_tokens(
    chunks: Sequence[torch.nn.Module], steps: Sequence[Step], vocab_size: int
) -> list[int]:
    """Collective: pass over some tokens; return the most likely next one of every text, or -1."""
    from megatron.core import parallel_state

    num_texts = len(steps[0].batch.tokens)
    collected = run_together(chunks, steps, vocab_size)
    found = torch.zeros(len(steps) * num_texts, dtype=torch.float64, device=device())
    if collected:
        found = torch.cat([values[num_texts:] for values in collected])
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(
            found,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return [int(token) for token in found.tolist()]


def _all_texts(
    mine: Sequence[_Text], prompts: Sequence[Prompt], data_ranks: DataRanks
) -> list[list[int]] | None:
    """Collective: return what was written behind every prompt, None where a text is broken."""
    longest = max(prompt.max_new_tokens for prompt in prompts)
    local = torch.full((len(mine), 2 + longest), -1, dtype=torch.int64)
    for row, text in zip(local, mine, strict=True):
        row[0], row[1] = text.number, int(text.is_broken)
        row[2 : 2 + len(text.new)] = torch.tensor(text.new, dtype=torch.int64)
    found = gathered(local.to(device()), data_ranks).tolist()
    if any(is_broken for _, is_broken, *_ in found):
        return None
    new: list[list[int]] = [[] for _ in prompts]
    for number, _, *tokens in found:
        if number != _COPY:
            new[number] = [token for token in tokens if token >= 0]
    return new
