"""The logits that are asked for, and what is made of them under any parallel layout.

The probabilities are the model's own: the sum runs over all rows of the vocabulary, those that pad
it included, as in the training loss, so that scores of continuations and held-out losses are the
same numbers. Training pushes what pads the vocabulary, like any token that never occurs, to a
probability near zero. What a greedy choice takes is another matter: an id that the tokenizer does
not have is no answer, so the padding rows take no part in it.

Full logits are never gathered: tensor-parallel ranks share the maximum, the sum of exponentials and
the logits asked for, three numbers where the vocabulary has a hundred thousand.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_mergemix.megatron.dist_checkpoint import unwrap

_NO_TOKEN = 2**52
"""Larger than any id, and exact in float64."""

_LOGITS_AT_ONCE = 2**24
"""Turned into float64 at a time: 128 MiB."""


class Batch(NamedTuple):
    """The tokens ``[B, S]`` of one pass, and what is asked for in it."""

    tokens: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
    target_slots: torch.Tensor
    target_tokens: torch.Tensor


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
