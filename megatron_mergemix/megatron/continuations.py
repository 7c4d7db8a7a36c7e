"""Log-probabilities of continuations under any parallel layout.

The probabilities are the model's own: the sum runs over all rows of the vocabulary, those that pad
it included, as in the training loss, so that scores of continuations and held-out losses are the
same numbers. Training pushes what pads the vocabulary, like any token that never occurs, to a
probability near zero. What a greedy choice takes is another matter: an id that the tokenizer does
not have is no answer, so the padding rows take no part in it.

Full logits are never gathered: tensor-parallel ranks share the maximum, the sum of exponentials and
the logits asked for, three numbers where the vocabulary has a hundred thousand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_mergemix.evaluate.continuations import Continuations, Group
from megatron_mergemix.megatron import parallel as ranks
from megatron_mergemix.megatron.dist_checkpoint import unwrap
from megatron_mergemix.megatron.replicas import DataRanks, all_data_ranks
from megatron_mergemix.megatron.scoring import in_eval_mode, rows_of_this_rank

_NO_TOKEN = 2**52
"""Larger than any id, and exact in float64."""

_LOGITS_AT_ONCE = 2**24
"""Turned into float64 at a time: 128 MiB."""


class Batch(NamedTuple):
    """One micro-batch: ``tokens`` ``[B, S]``, and what is asked for in it."""

    tokens: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
    target_slots: torch.Tensor
    target_tokens: torch.Tensor


def continuation_log_probs(
    chunks: Sequence[torch.nn.Module],
    continuations: Continuations,
    data_ranks: DataRanks | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probability of every continuation in nats, and whether it is greedy.

    Collective: every rank passes the same continuations and gets the same result. Micro-batches
    are dealt out to data-parallel ranks as in :func:`.scoring.sequence_losses`, so that every bit
    of a dense model's result does not depend on how many ranks there are.

    Args:
        chunks: this rank's model chunks.
        continuations: what is asked for.
        data_ranks: the data-parallel ranks that score together; None for all.

    Returns:
        float64 and bool, each ``[num_requests]``, on the CPU. NaN and False where the model's
        logits are not finite.
    """
    log_probs, best = _measured(chunks, continuations, data_ranks)
    places, requests = continuations.request_targets, continuations.requests
    sums = torch.zeros(continuations.num_requests, dtype=torch.float64)
    sums.index_add_(0, requests, log_probs[places])
    other = torch.zeros(continuations.num_requests, dtype=torch.int64)
    missed = best[continuations.target_slots] != continuations.target_tokens
    other.index_add_(0, requests, missed[places].long())
    return sums, other == 0


def most_likely_tokens(
    chunks: Sequence[torch.nn.Module],
    continuations: Continuations,
    data_ranks: DataRanks | None = None,
) -> torch.Tensor:
    """Return the tokenizer's most likely id after every request's context, int64 on the CPU.

    Collective, as :func:`continuation_log_probs`, for continuations of one token. Of equally likely
    ids it is the lowest. -1 where the model's logits are not finite.
    """
    assert len(continuations.request_targets) == continuations.num_requests
    _, best = _measured(chunks, continuations, data_ranks)
    return best[continuations.target_slots[continuations.request_targets]]


def _measured(
    chunks: Sequence[torch.nn.Module], asked: Continuations, data_ranks: DataRanks | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Collective: return the log-probability of every target, and the best id of every slot."""
    from megatron.core import parallel_state

    data_ranks = data_ranks or all_data_ranks()
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
    """Collective: run this rank's share of a group; yield number and values of its micro-batches.

    Each rank runs the same number of micro-batches, which MoE experts spread over ranks rely on.
    Those that only fill up are left out of what is yielded.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    tokens = micro_batches_of(group, chunks[0])
    mine, num_microbatches = rows_of_this_rank(len(tokens), 1, len(chunks), data_ranks)
    # Virtual pipeline stages take turns, so that each walks through the batches by itself.
    batches = [_batches(tokens, group.first, mine, asked) for _ in chunks]
    collected = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, asked.vocab_size),
        data_iterator=batches if len(chunks) > 1 else batches[0],
        model=list(chunks),
        num_microbatches=num_microbatches,
        seq_length=tokens[0].shape[1],
        micro_batch_size=tokens[0].shape[0],
        forward_only=True,
        collect_non_loss_data=True,
    )
    if parallel_state.is_pipeline_last_stage():
        begin = data_ranks.own * num_microbatches
        for place, values in enumerate(collected[: max(0, len(tokens) - begin)]):
            yield group.first + begin + place, values


def micro_batches_of(group: Group, chunk: torch.nn.Module) -> list[torch.Tensor]:
    """Return a group's micro-batches ``[B, S]`` as this model takes them.

    Pipeline stages expect one length of each other and MoE experts may do so, whatever the number
    of ranks; elsewhere padding is cut away. Sequence parallelism gets lengths that it can divide,
    fp8 as many tokens at a time as it multiplies.
    """
    from megatron.core import parallel_state
    from megatron.core.utils import get_model_config

    config = get_model_config(chunk)
    tokens = list(group.tokens)
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    if stages == 1 and getattr(config, "num_moe_experts", None) is None:
        tokens = [rows[:, :length] for rows, length in zip(tokens, group.lengths, strict=True)]
    step = _length_step(config, tokens[0].shape[0])
    if step > 1:
        tokens = [torch.nn.functional.pad(rows, (0, -rows.shape[1] % step)) for rows in tokens]
    return tokens


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


def _batches(
    tokens: Sequence[torch.Tensor], first: int, mine: torch.Tensor, asked: Continuations
) -> Iterator[Batch]:
    device = ranks.device()
    for place in mine.tolist():
        slots = slice(*asked.slot_starts[first + place : first + place + 2])
        targets = slice(*asked.target_starts[first + place : first + place + 2])
        yield Batch(
            tokens[place].to(device),
            asked.slot_rows[slots].to(device),
            asked.slot_positions[slots].to(device),
            (asked.target_slots[targets] - slots.start).to(device),
            asked.target_tokens[targets].to(device),
        )


def _forward_step(vocab_size: int, batches: Iterator[Batch], chunk: torch.nn.Module) -> Any:
    from megatron.core.transformer.module import Float16Module

    batch = next(batches)
    positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    if known := getattr(unwrap(chunk), "max_sequence_length", None):
        positions = positions.clamp(max=known - 1)  # only what pads a row may lie beyond
    # What the model returns is not looked at, and in fp32 would be as large again.
    options = {"fp32_output": False} if isinstance(chunk, Float16Module) else {}
    with Selection(chunk, batch) as selection:
        output = chunk(
            batch.tokens,
            positions.expand(len(batch.tokens), -1),
            None,
            labels=selection.labels,
            runtime_gather_output=False,
            **options,
        )

    def collected(_: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
        return probabilities(selection.logits(), batch, vocab_size)

    return output, collected


class Selection:
    """Lets the output layer see only the positions that are asked for, wherever that can be.

    Under sequence parallelism its input is a part of every sequence, with heads for several tokens
    ahead Megatron compares all its outputs with labels, and in fp8 it takes no odd number of them:
    there they are picked afterwards.
    """

    def __init__(self, chunk: torch.nn.Module, batch: Batch) -> None:
        from megatron.core.utils import get_model_config

        model: Any = unwrap(chunk)
        self._layer = getattr(model, "output_layer", None)
        self._scaled = getattr(model, "_scale_logits", None)  # by muP; Megatron-LM 0.19 has it
        self._batch = batch
        self._output: torch.Tensor | None = None
        config = get_model_config(chunk)
        ahead = bool(getattr(config, "mtp_num_layers", None))
        self.labels = torch.zeros_like(batch.tokens) if ahead else None
        in_fp8 = getattr(config, "fp8_output_proj", False)
        self._is_early = not config.sequence_parallel and not ahead and not in_fp8

    def __enter__(self) -> Selection:
        self._hooks = ExitStack()
        if self._layer is not None:
            before = self._layer.register_forward_pre_hook(self._before, with_kwargs=True)
            self._hooks.callback(before.remove)
            self._hooks.callback(self._layer.register_forward_hook(self._keep).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _before(
        self, layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], options: dict[str, Any]
    ) -> Any:
        if "runtime_gather_output" in options:  # Megatron insists on it beside a cache
            options = {**options, "runtime_gather_output": False}
        if not self._is_early:
            return inputs, options
        hidden = inputs[0]  # [S, B, H]
        picked = hidden[self._batch.positions, self._batch.rows].unsqueeze(1)
        return (picked, *inputs[1:]), options

    def _keep(self, layer: torch.nn.Module, inputs: Any, output: Any) -> None:
        # Of several calls, the last is that for the next token. Where there are labels, what is
        # picked is a copy: the loss may be computed within the memory of all.
        places = (slice(None), 0) if self._is_early else (self._batch.positions, self._batch.rows)
        self._output = output[0][places]

    def logits(self) -> torch.Tensor:
        """Return this rank's part of the logits that are asked for, ``[slots, V / TP]``."""
        assert self._output is not None
        return self._output if self._scaled is None else self._scaled(self._output)


def probabilities(part: torch.Tensor, batch: Batch, vocab_size: int) -> torch.Tensor:
    """Collective: return the targets' log-probabilities, then the best id of every slot.

    Over the tensor-parallel ranks, which hold neighbouring parts of the vocabulary.
    """
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    first = parallel_state.get_tensor_model_parallel_rank() * part.shape[1]
    known = part[:, : max(0, min(vocab_size - first, part.shape[1]))]
    if known.shape[1]:
        likeliest, place = known.max(dim=1)  # the first one of equal ones
    else:
        likeliest = part.new_full((len(part),), -torch.inf)
        place = torch.zeros(len(part), dtype=torch.int64, device=part.device)
    peaks = torch.stack([part.max(dim=1).values, likeliest]).float()
    dist.all_reduce(peaks, dist.ReduceOp.MAX, group=group)
    best = torch.where(likeliest == peaks[1], place + first, _NO_TOKEN)
    dist.all_reduce(best, dist.ReduceOp.MIN, group=group)

    column = batch.target_tokens - first
    is_here = (column >= 0) & (column < part.shape[1])
    chosen = part[batch.target_slots, column.clamp(0, part.shape[1] - 1)]
    chosen = torch.where(is_here, chosen, 0.0).double()
    total = _sums_of_exponentials(part, peaks[0])
    sums = torch.cat([total, chosen])
    dist.all_reduce(sums, group=group)
    total, chosen = sums.split([len(total), len(chosen)])
    norm = peaks[0].double() + total.log()
    return torch.cat(
        [
            chosen - norm[batch.target_slots],
            torch.where(norm.isfinite(), best, -1).double(),
        ]
    )


def _sums_of_exponentials(part: torch.Tensor, peaks: torch.Tensor) -> torch.Tensor:
    """Return the sum of ``exp(logit - peak)`` of every row, float64.

    A few rows at a time: in fp32 and fp64, all logits of a window take six times what they take in
    bf16, and a rolling task asks for all.
    """
    rows = max(1, _LOGITS_AT_ONCE // part.shape[1])
    return torch.cat(
        [
            (logits.float() - peak[:, None]).exp_().sum(dim=1, dtype=torch.float64)
            for logits, peak in zip(part.split(rows), peaks.split(rows), strict=True)
        ]
    )
