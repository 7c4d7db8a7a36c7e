"""Passes over micro-batches, and the values that are asked for in them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_mergemix.evaluate.continuations import Continuations
from megatron_mergemix.evaluate.micro_batches import Group
from megatron_mergemix.megatron import kv_cache
from megatron_mergemix.megatron.device import device
from megatron_mergemix.megatron.dist_checkpoint import unwrap
from megatron_mergemix.megatron.logits import Batch, Selection, probabilities
from megatron_mergemix.megatron.replicas import DataRanks
from megatron_mergemix.megatron.scoring import in_eval_mode, rows_of_this_rank

_WHERE_TO_LOOK = ("slot_rows", "slot_positions", "target_slots", "target_tokens")

_LEAST_ON_CPU, _LEAST_ON_GPU = 64, 300
"""Tokens that a pass over fewer takes as long as: layers are called, and on a GPU weights are read.
The latter is where an H100 multiplies for as long as it reads a weight of 16 bits (990 TFLOP/s,
3.35 TB/s); the former is by hand."""


class Step(NamedTuple):
    """What one micro-batch does in a call of the schedule.

    Attributes:
        batch: its tokens, and what is asked for in them.
        first: how many tokens are before them.
        kept: keys and values of these, to which its own are added; None where none are kept.
    """

    batch: Batch
    first: int = 0
    kept: Any = None


def measure(
    chunks: Sequence[torch.nn.Module], asked: Continuations, data_ranks: DataRanks
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probability of every target, and the best id of every slot, on the CPU.

    Collective, over the data-parallel ranks in ``data_ranks`` and the model-parallel ranks of each.
    Micro-batches are dealt out to the former as in :func:`.scoring.sequence_losses`, so that every
    bit of a dense model's result does not depend on how many there are.
    """
    from megatron.core import parallel_state

    num_targets, num_slots = asked.target_starts[-1], asked.slot_starts[-1]
    # One tensor, so that one message at the end takes all of it to all ranks.
    found = torch.zeros(num_targets + num_slots, dtype=torch.float64, device=device())
    with in_eval_mode(chunks), torch.no_grad():
        on_device = replace(
            asked, **{name: getattr(asked, name).to(found.device) for name in _WHERE_TO_LOOK}
        )
        for group in asked.groups:
            run = _run_in_waves if group.keeps else _run
            for number, values in run(chunks, group, on_device, data_ranks):
                first, end = asked.target_starts[number : number + 2]
                found[first:end] = values[: end - first]
                slots = slice(*asked.slot_starts[number : number + 2])
                found[num_targets:][slots] = values[end - first :]
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(
            found,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    if data_ranks.size > 1:  # every value is on one of them, and zero on the others
        dist.all_reduce(found, group=data_ranks.group)
    log_probs, best = found.cpu().split([num_targets, num_slots])
    return log_probs, best.long()


def _run(
    chunks: Sequence[torch.nn.Module], group: Group, asked: Continuations, data_ranks: DataRanks
) -> Iterator[tuple[int, torch.Tensor]]:
    """Collective: run this rank's share of a group of single passes; yield number and values.

    Each rank runs the same number of micro-batches, which MoE experts spread over ranks rely on.
    Those that only fill up are left out of what is yielded.
    """
    tokens = micro_batches_of(group, chunks[0])
    mine, num_microbatches = rows_of_this_rank(len(tokens), 1, len(chunks), data_ranks)
    begin = data_ranks.own * num_microbatches
    steps = [Step(_batch(tokens[place], group.first + place, asked)) for place in mine.tolist()]
    found = run_together(chunks, steps, asked.vocab_size)
    for place, values in enumerate(found[: max(0, len(tokens) - begin)], begin):
        yield group.first + place, values


def _run_in_waves(
    chunks: Sequence[torch.nn.Module], group: Group, asked: Continuations, data_ranks: DataRanks
) -> Iterator[tuple[int, torch.Tensor]]:
    """Collective: run this rank's share of a group that keeps contexts; yield number and values.

    Neighbours, as many as keep their contexts at once, are dealt out together, and padded to one
    length only where the model wants that. So what is in a pass of a dense model does not depend
    on how many data-parallel ranks there are.
    """
    needs = _needs(chunks[0], len(group.passes[0][0]))
    count, size = len(group.begins), kv_cache.at_once()
    waves = [range(start, min(start + size, count)) for start in range(0, count, size)]
    longest = group.reach + needs.step - 1
    kept = [kv_cache.empty(len(group.passes[0][0]), longest) for _ in waves[0]]
    for turn in range(0, len(waves), data_ranks.size):
        together = waves[turn : turn + data_ranks.size]
        is_mine = data_ranks.own < len(together)
        mine = together[data_ranks.own if is_mine else 0]
        # MoE experts that are spread over ranks get as many micro-batches, as long, from each.
        filled = [*mine, *[mine[-1]] * (len(together[0]) - len(mine))]
        alike = [place for wave in together for place in wave] if needs.alike_over_ranks else mine
        lengths = group.of_one_length(alike)
        for number, tokens in enumerate(group.passes):
            first = group.first + number * count
            steps = [
                Step(
                    _batch(_cut(tokens[place], lengths[number], needs), first + place, asked),
                    group.begins[place] if number else 0,
                    cache,
                )
                for place, cache in zip(filled, kept, strict=False)
            ]
            found = run_together(chunks, steps, asked.vocab_size)
            if is_mine:
                yield from zip((first + place for place in mine), found, strict=False)


def _batch(tokens: torch.Tensor, number: int, asked: Continuations) -> Batch:
    slots = slice(*asked.slot_starts[number : number + 2])
    targets = slice(*asked.target_starts[number : number + 2])
    return Batch(
        tokens,
        asked.slot_rows[slots],
        asked.slot_positions[slots],
        asked.target_slots[targets] - slots.start,
        asked.target_tokens[targets],
    )


def run_together(
    chunks: Sequence[torch.nn.Module], steps: Sequence[Step], vocab_size: int
) -> list[torch.Tensor]:
    """Collective: run micro-batches of one length by one call of the pipeline schedule.

    Returns:
        On last stages the :func:`.logits.probabilities` of each; elsewhere nothing.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    num_texts, length = steps[0].batch.tokens.shape
    goes_on = length > 1 and steps[0].first > 0
    with kv_cache.many_tokens_go_on(chunks) if goes_on else nullcontext():
        collected = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, vocab_size),
            # Virtual pipeline stages take turns, so that each walks through the steps by itself.
            data_iterator=[iter(steps) for _ in chunks] if len(chunks) > 1 else iter(steps),
            model=list(chunks),
            num_microbatches=len(steps),
            seq_length=length,
            micro_batch_size=num_texts,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return list(collected) if parallel_state.is_pipeline_last_stage() else []


def _forward_step(vocab_size: int, steps: Iterator[Step], chunk: torch.nn.Module) -> Any:
    from megatron.core.transformer.module import Float16Module

    step = next(steps)
    batch = Batch(*(each.to(device()) for each in step.batch))
    end = step.first + batch.tokens.shape[1]
    positions = torch.arange(step.first, end, device=batch.tokens.device)
    if known := getattr(unwrap(chunk), "max_sequence_length", None):
        positions = positions.clamp(max=known - 1)  # only what pads a row may lie beyond
    # What the model returns is not looked at, and in fp32 would be as large again.
    options: dict[str, Any] = {"fp32_output": False} if isinstance(chunk, Float16Module) else {}
    if step.kept is not None:
        step.kept.sequence_len_offset = step.first
        options["inference_context"] = step.kept
    with Selection(chunk, batch) as selection:
        output = chunk(
            batch.tokens,
            positions.expand(len(batch.tokens), -1),
            None,
            labels=selection.labels,
            # Megatron insists on gathering beside a cache; the selection sees that it is not done.
            runtime_gather_output=step.kept is not None,
            **options,
        )

    def collected(_: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
        return probabilities(selection.logits(), batch, vocab_size)

    return output, collected


class _Needs(NamedTuple):
    """What a model wants of the lengths of micro-batches.

    Attributes:
        alike: whether those of one call must be of one length: pipeline stages expect it of each
            other, and MoE experts may do so, whatever the number of ranks.
        alike_over_ranks: whether those of all data-parallel ranks must.
        step: what they are multiples of.
    """

    alike: bool
    alike_over_ranks: bool
    step: int

    def padded(self, length: int) -> int:
        """Return the least length from this on that is a multiple of the step."""
        return -(-length // self.step) * self.step


def _needs(chunk: torch.nn.Module, micro_batch_size: int) -> _Needs:
    from megatron.core import parallel_state
    from megatron.core.utils import get_model_config

    config = get_model_config(chunk)
    has_moe = getattr(config, "num_moe_experts", None) is not None
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    return _Needs(stages > 1 or has_moe, has_moe, _length_step(config, micro_batch_size))


def _cut(rows: torch.Tensor, length: int, needs: _Needs) -> torch.Tensor:
    rows = rows[:, :length]
    return torch.nn.functional.pad(rows, (0, needs.padded(rows.shape[1]) - rows.shape[1]))


def micro_batches_of(group: Group, chunk: torch.nn.Module) -> list[torch.Tensor]:
    """Return a group's micro-batches ``[B, S]`` of single passes as this model takes them.

    Padding is cut away where they need not be of one length. Sequence parallelism gets lengths
    that it can divide, fp8 as many tokens at a time as it multiplies.
    """
    (tokens,), (lengths,) = group.passes, group.lengths
    needs = _needs(chunk, tokens.shape[1])
    return [
        _cut(rows, tokens.shape[2] if needs.alike else length, needs)
        for rows, length in zip(tokens, lengths, strict=True)
    ]


def work(chunk: torch.nn.Module, asked: Continuations) -> int:
    """Return what requests cost this model in tokens, padding and passes included.

    The same on every rank, and for any number of data-parallel ranks.
    """
    sizes = {len(group.passes[0][0]) for group in asked.groups}
    needs = _needs(chunk, min(sizes, default=1))
    least = _LEAST_ON_GPU if device().type == "cuda" else _LEAST_ON_CPU
    return asked.work(kv_cache.at_once(), needs.alike, least)


def _length_step(config: Any, micro_batch_size: int) -> int:
    """Return what the lengths of rows must be multiples of.

    A matrix product takes all tokens of a micro-batch, under sequence parallelism this rank's part
    of them; in fp8 it wants a multiple of some number.
    """
    cut = config.tensor_model_parallel_size if config.sequence_parallel else 1
    wanted = cut
    if getattr(config, "fp8", None):
        from megatron.core.fp8_utils import get_fp8_align_size

        wanted *= get_fp8_align_size(config.fp8_recipe)
    elif getattr(config, "fp4", None):
        from megatron.core.fp4_utils import get_fp4_align_size

        wanted *= get_fp4_align_size(config.fp4_recipe)
    return math.lcm(cut, wanted // math.gcd(wanted, micro_batch_size))
