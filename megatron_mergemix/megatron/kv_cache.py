"""Greedy decoding from a KV cache: one pass over a text, then one over each new token.

Megatron's attention keeps keys and values in a ``StaticInferenceContext``, one per micro-batch. A
wave has as many micro-batches as there are pipeline stages. Prompts are sorted by length and dealt
out to the data-parallel ranks in waves, so that what is in one, and with it every bit of a dense
model's logits, does not depend on how many ranks there are. All texts of a wave are read up to the
length of its shortest prompt at once, and from there on token by token: where a prompt goes on its
own tokens are taken, behind its end the most likely ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_mergemix.evaluate.continuations import Prompt
from megatron_mergemix.megatron import parallel as ranks
from megatron_mergemix.megatron.continuations import Batch, Selection, probabilities
from megatron_mergemix.megatron.dist_checkpoint import unwrap
from megatron_mergemix.megatron.replicas import DataRanks
from megatron_mergemix.megatron.scoring import gathered, in_eval_mode

IsDone = Callable[[int, Sequence[int]], bool]
"""Says of a prompt, by its number, whether what was written behind it is a whole answer."""

_POSITIONS = ("rope", "learned_absolute", "none")
_OTHERWISE = (
    *("window_size", "multi_latent_attention", "experimental_attention_variant"),
    *("fp8", "fp4", "mtp_num_layers", "flash_decode", "enable_cuda_graph"),
)
"""Settings of Megatron's configuration with which attention or products go another way."""


def least(value: int, data_ranks: DataRanks) -> int:
    """Collective: return the least of the values of all ranks that generate together."""
    from megatron.core import parallel_state

    answer = torch.tensor(float(value), device=ranks.device())
    for group in (parallel_state.get_model_parallel_group(), data_ranks.group):
        if group is not None:
            dist.all_reduce(answer, dist.ReduceOp.MIN, group=group)
    return int(answer.item())


def serve(chunks: Sequence[torch.nn.Module]) -> bool:
    """Return whether this rank's layers are known to go on from what they kept.

    Not where a token would need to see others than all before it, where one token alone cannot be
    cut over ranks or multiplied in fp8, and with virtual pipeline stages.
    """
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.attention import SelfAttention

    model: Any = unwrap(chunks[0])
    if len(chunks) > 1 or type(model) is not GPTModel:
        return False
    config = model.config
    return (
        not any(getattr(config, name, None) for name in _OTHERWISE)
        and not config.sequence_parallel
        and config.context_parallel_size == 1
        and getattr(config, "cuda_graph_impl", "none") == "none"
        and model.position_embedding_type in _POSITIONS
        and all(type(layer.self_attention) is SelfAttention for layer in model.decoder.layers)
    )


def cache_bytes(chunks: Sequence[torch.nn.Module], micro_batch_size: int, length: int) -> int:
    """Return the bytes that this rank keeps at once for texts of a length; 0 where none are kept.

    Decoding has as many micro-batches under way as there are pipeline stages.
    """
    from megatron.core import parallel_state

    if not serve(chunks):
        return 0
    model: Any = unwrap(chunks[0])
    attentions = [layer.self_attention for layer in model.decoder.layers]
    elements = sum(
        2 * attention.num_query_groups_per_partition * attention.hidden_size_per_attention_head
        for attention in attentions
    )
    texts = parallel_state.get_pipeline_model_parallel_world_size() * micro_batch_size
    return int(texts * length * elements * model.config.params_dtype.itemsize)


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


class _Step(NamedTuple):
    """What one micro-batch does next: some tokens ``[B, S]``, and what it kept of those before."""

    tokens: torch.Tensor
    first: int
    kept: Any


def generate(
    chunks: Sequence[torch.nn.Module],
    prompts: Sequence[Prompt],
    is_done: IsDone,
    micro_batch_size: int,
    vocab_size: int,
    data_ranks: DataRanks,
) -> list[list[int]] | None:
    """Collective: return the tokens that follow every prompt, None where logits are not finite.

    As :func:`.generation.generate`, where :func:`serve` on every rank.
    """
    from megatron.core import parallel_state

    asked = [number for number, prompt in enumerate(prompts) if prompt.max_new_tokens > 0]
    if not asked:
        return [[] for _ in prompts]
    asked.sort(key=lambda number: (-len(prompts[number].tokens), number))
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    waves = [
        [
            [_Text(n, prompts[asked[-1] if n == _COPY else n], goes_on=n != _COPY) for n in batch]
            for batch in wave
        ]
        for wave in _dealt_out(asked, micro_batch_size, stages, data_ranks)
    ]
    with in_eval_mode(chunks), torch.no_grad():
        for wave in waves:
            _write(chunks, wave, is_done, vocab_size, data_ranks)
    mine = [text for wave in waves for batch in wave for text in batch]
    return _all_texts(mine, prompts, data_ranks)


def _dealt_out(
    numbers: Sequence[int], micro_batch_size: int, stages: int, data_ranks: DataRanks
) -> list[list[list[int]]]:
    """Return this rank's waves of micro-batches, every so many one, filled up with copies.

    Each rank gets as many, which MoE experts spread over ranks rely on.
    """
    size = micro_batch_size * stages
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
    kept = [_empty_cache(len(batch), longest) for batch in wave]
    first, end = 0, _least(min(len(text.prompt.tokens) for text in texts), chunks, data_ranks)
    while _anyone(any(text.goes_on for text in texts), chunks, data_ranks):
        steps = [
            _Step(_tokens(batch, first, end), first, cache)
            for batch, cache in zip(wave, kept, strict=True)
        ]
        for text, token in zip(texts, _next_tokens(chunks, steps, vocab_size), strict=True):
            text.take(token, end, is_done)
        first = min(end, longest - 1)  # a rank that is done goes along with the others
        end = first + 1


def _tokens(batch: Sequence[_Text], first: int, end: int) -> torch.Tensor:
    rows = [[text.token_at(place) for place in range(first, end)] for text in batch]
    return torch.tensor(rows, dtype=torch.int64)


def _empty_cache(num_texts: int, longest: int) -> Any:
    from megatron.core.inference.contexts import StaticInferenceContext

    cache: Any = StaticInferenceContext(num_texts, longest)
    # What is picked is picked by us. Megatron Core 0.17 reads it from a configuration.
    holder: Any
    for holder in (cache, getattr(cache, "config", None)):
        if hasattr(holder, "materialize_only_last_token_logits"):
            holder.materialize_only_last_token_logits = False
    return cache


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
    largest = torch.tensor(value, device=ranks.device())
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=data_ranks.group)
    return int(largest.item())


def _next_tokens(
    chunks: Sequence[torch.nn.Module], steps: Sequence[_Step], vocab_size: int
) -> list[int]:
    """Collective: pass over some tokens; return the most likely next one of every text, or -1."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    num_texts, length = steps[0].tokens.shape
    collected = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, vocab_size),
        data_iterator=iter(steps),
        model=list(chunks),
        num_microbatches=len(steps),
        seq_length=length,
        micro_batch_size=num_texts,
        forward_only=True,
        collect_non_loss_data=True,
    )
    found = torch.zeros(len(steps) * num_texts, dtype=torch.float64, device=ranks.device())
    if parallel_state.is_pipeline_last_stage():
        found = torch.cat([values[num_texts:] for values in collected])
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(
            found,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return [int(token) for token in found.tolist()]


def _forward_step(vocab_size: int, steps: Iterator[_Step], chunk: torch.nn.Module) -> Any:
    step = next(steps)
    tokens = step.tokens.to(ranks.device())
    rows = torch.arange(len(tokens), device=tokens.device)
    last = torch.full_like(rows, tokens.shape[1] - 1)
    batch = Batch(tokens, rows, last, rows, torch.zeros_like(rows))
    positions = torch.arange(step.first, step.first + tokens.shape[1], device=tokens.device)
    step.kept.sequence_len_offset = step.first
    with Selection(chunk, batch) as selection:
        output = chunk(
            tokens,
            positions.expand(len(tokens), -1),
            None,
            inference_context=step.kept,
            runtime_gather_output=True,  # asked for; the selection sees that it is not done
        )

    def collected(_: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
        return probabilities(selection.logits(), batch, vocab_size)

    return output, collected


def _all_texts(
    mine: Sequence[_Text], prompts: Sequence[Prompt], data_ranks: DataRanks
) -> list[list[int]] | None:
    """Collective: return what was written behind every prompt, None where a text is broken."""
    longest = max(prompt.max_new_tokens for prompt in prompts)
    local = torch.full((len(mine), 2 + longest), -1, dtype=torch.int64)
    for row, text in zip(local, mine, strict=True):
        row[0], row[1] = text.number, int(text.is_broken)
        row[2 : 2 + len(text.new)] = torch.tensor(text.new, dtype=torch.int64)
    found = gathered(local.to(ranks.device()), data_ranks).tolist()
    if any(is_broken for _, is_broken, *_ in found):
        return None
    new: list[list[int]] = [[] for _ in prompts]
    for number, _, *tokens in found:
        if number != _COPY:
            new[number] = [token for token in tokens if token >= 0]
    return new
