"""Passes over micro-batches, and the values that are asked for in them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_mergemix.evaluate.continuations import Continuations
from megatron_mergemix.evaluate.micro_batches import Group
from megatron_mergemix.megatron import kv_cache
from megatron_mergemix.megatron import parallel as ranks
from megatron_mergemix.megatron.dist_checkpoint import unwrap
from megatron_mergemix.megatron.logits import Batch, Selection, probabilities
from megatron_mergemix.megatron.replicas import DataRanks
from megatron_mergemix.megatron.scoring import in_eval_mode, rows_of_this_rank


class Step(NamedTuple):
    """What one micro-batch does in a call of the schedule.

    Attributes:
        batch: its tokens, and what is asked for in them; on the CPU.
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
    found = torch.zeros(num_targets + num_slots, dtype=torch.float64, device=ranks.device())
    with in_eval_mode(chunks), torch.no_grad():
        for group in asked.groups:
            for number, values in _run(chunks, group, asked, data_ranks):
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
    """Collective: run this rank's share of a group; yield number and values of its passes.

    Each rank runs the same number of micro-batches, which MoE experts spread over ranks rely on.
    Those that only fill up are left out of what is yielded.
    """
    count, keeps = len(group.begins), len(group.passes) > 1
    mine, num_microbatches = rows_of_this_rank(count, 1, len(chunks), data_ranks)
    begin = data_ranks.own * num_microbatches
    places = list(enumerate(mine.tolist(), begin))
    passes = passes_of(group, chunks[0])
    at_once = kv_cache.at_once() if keeps else num_microbatches
    for start in range(0, num_microbatches, at_once):
        wave = places[start : start + at_once]
        kept = [_cache(group, passes, place) if keeps else None for _, place in wave]
        for later, tokens in enumerate(passes):
            first_of_pass = group.first + later * count
            steps = [
                Step(
                    _batch(tokens[place], first_of_pass + place, asked),
                    group.begins[place] if later else 0,
                    cache,
                )
                for (_, place), cache in zip(wave, kept, strict=True)
            ]
            found = run_together(chunks, steps, asked.vocab_size)
            for (number, _), values in zip(wave, found, strict=False):  # none but on last stages
                if number < count:
                    yield first_of_pass + number, values


def _cache(group: Group, passes: Sequence[Sequence[torch.Tensor]], place: int) -> Any:
    """Return a cache as long as any pass over this micro-batch reaches."""
    first, *later = (tokens[place].shape[1] for tokens in passes)
    return kv_cache.empty(len(passes[0][place]), max(first, group.begins[place] + max(later)))


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
    batch = Batch(*(each.to(ranks.device()) for each in step.batch))
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


def passes_of(group: Group, chunk: torch.nn.Module) -> list[list[torch.Tensor]]:
    """Return the tokens ``[B, S]`` of every micro-batch in every pass, as this model takes them.

    Pipeline stages expect one length of each other and MoE experts may do so, whatever the number
    of ranks; elsewhere padding is cut away. Sequence parallelism gets lengths that it can divide,
    fp8 as many tokens at a time as it multiplies.
    """
    from megatron.core import parallel_state
    from megatron.core.utils import get_model_config

    config = get_model_config(chunk)
    passes = [list(tokens) for tokens in group.passes]
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    if stages == 1 and getattr(config, "num_moe_experts", None) is None:
        passes = [
            [rows[:, :length] for rows, length in zip(tokens, lengths, strict=True)]
            for tokens, lengths in zip(passes, group.lengths, strict=True)
        ]
    step = _length_step(config, passes[0][0].shape[0])
    if step > 1:
        passes = [
            [torch.nn.functional.pad(rows, (0, -rows.shape[1] % step)) for rows in tokens]
            for tokens in passes
        ]
    return passes


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
