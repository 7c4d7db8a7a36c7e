"""Continuations to be scored, cut into micro-batches once, before any model is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

_CALL_COST = 4
"""Micro-batches that a further call of a schedule is worth: stages fill and drain, and
data-parallel ranks get whole micro-batches."""

_LENGTH_STEP = 8
"""Lengths are multiples of it: tensor cores want it, and sequence parallelism divides it."""

Tokens = Sequence[int]


class Request(NamedTuple):
    """The probability of which tokens after which others is asked for; neither is empty."""

    context: Tokens
    continuation: Tokens


class Prompt(NamedTuple):
    """The tokens that a text begins with, and how many may follow."""

    tokens: Tokens
    max_new_tokens: int


@dataclass(frozen=True)
class Group:
    """Micro-batches of one length: what one call of a pipeline schedule runs.

    Attributes:
        tokens: int64 ``[M, micro_batch_size, S]``, rows padded on the right with zeros.
        first: number of its first micro-batch.
        lengths: to which each micro-batch can be cut where they need not be of one length.
    """

    tokens: torch.Tensor
    first: int
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Continuations:
    """Token requests as micro-batches; the same on every rank, and under every layout.

    A *slot* is a position of a row whose next token is asked for, a *target* one of the tokens
    that is asked for there. Slots are numbered by micro-batch, row and position, targets by slot,
    so that those of a micro-batch are neighbours.

    Attributes:
        groups: the micro-batches, longest rows first.
        slot_rows: the row within the micro-batch of every slot, int64.
        slot_positions: the position in the row of every slot, int64.
        slot_starts: first slot of every micro-batch, and the number of slots.
        target_slots: the slot of every target, int64.
        target_tokens: its token, int64.
        target_starts: first target of every micro-batch, and the number of targets.
        request_targets: the targets of all requests one after the other, int64.
        requests: the request that each of these belongs to, int64.
        num_requests: how many requests there are.
        num_tokens: tokens in all rows, without padding.
        vocab_size: ids that the tokenizer has; rows of the embedding beyond are padding.
    """

    groups: tuple[Group, ...]
    slot_rows: torch.Tensor
    slot_positions: torch.Tensor
    slot_starts: tuple[int, ...]
    target_slots: torch.Tensor
    target_tokens: torch.Tensor
    target_starts: tuple[int, ...]
    request_targets: torch.Tensor
    requests: torch.Tensor
    num_requests: int
    num_tokens: int
    vocab_size: int


def prepare(
    requests: Sequence[Request], *, max_length: int, micro_batch_size: int, vocab_size: int
) -> Continuations:
    """Return the requests as micro-batches.

    A row is run once for all requests that can be read from it: identical ones, ones that differ
    in their last token alone (the letters of a multiple choice), and ones whose tokens begin
    another row, which a causal model cannot tell from that row's beginning.

    Args:
        requests: contexts longer than fits are cut on the left.
        max_length: tokens that the model sees at once; no continuation is longer.
        micro_batch_size: rows per forward pass.
        vocab_size: ids that the tokenizer has.
    """
    assert all(request.context and request.continuation for request in requests)
    assert all(len(request.continuation) <= max_length for request in requests)
    whole = [(*context, *continuation)[-max_length - 1 :] for context, continuation in requests]
    home = _homes({tokens[:-1] for tokens in whole})
    rows = sorted(set(home.values()), key=lambda row: (-len(row), row))
    numbers = {row: number for number, row in enumerate(rows)}

    wanted = [np.empty((0, 3), np.int64)]  # row, position, token
    for tokens, (_, continuation) in zip(whole, requests, strict=True):
        positions = np.arange(len(tokens) - 1 - len(continuation), len(tokens) - 1)
        row = np.full(len(positions), numbers[home[tokens[:-1]]])
        wanted.append(np.stack([row, positions, np.asarray(continuation, np.int64)], axis=1))
    targets, request_targets = _distinct(np.concatenate(wanted))
    slots, target_slots = _distinct(targets[:, :2])

    starts = np.arange(0, len(rows) + micro_batch_size, micro_batch_size)
    counts = [len(request.continuation) for request in requests]
    return Continuations(
        groups=_groups(rows, max_length, micro_batch_size),
        slot_rows=torch.from_numpy(slots[:, 0] % micro_batch_size),
        slot_positions=torch.from_numpy(slots[:, 1].copy()),
        slot_starts=tuple(np.searchsorted(slots[:, 0], starts).tolist()),
        target_slots=torch.from_numpy(target_slots),
        target_tokens=torch.from_numpy(targets[:, 2].copy()),
        target_starts=tuple(np.searchsorted(targets[:, 0], starts).tolist()),
        request_targets=torch.from_numpy(request_targets),
        requests=torch.from_numpy(np.repeat(np.arange(len(requests)), counts)),
        num_requests=len(requests),
        num_tokens=sum(map(len, rows)),
        vocab_size=vocab_size,
    )


def _homes(inputs: set[tuple[int, ...]]) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Return for every input the longest one that begins with it."""
    home: dict[tuple[int, ...], tuple[int, ...]] = {}
    following: tuple[int, ...] = ()
    for row in sorted(inputs, reverse=True):  # what begins with a row comes right before it
        home[row] = home[following] if following[: len(row)] == row else row
        following = row
    return home


def _distinct(rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the distinct rows in order, and the place of every row among them."""
    distinct, places = np.unique(rows, axis=0, return_inverse=True)
    return distinct, places.reshape(-1).astype(np.int64)


def _groups(
    rows: Sequence[tuple[int, ...]], max_length: int, micro_batch_size: int
) -> tuple[Group, ...]:
    parts = [rows[n : n + micro_batch_size] for n in range(0, len(rows), micro_batch_size)]
    lengths = [min(max_length, -(-len(part[0]) // _LENGTH_STEP) * _LENGTH_STEP) for part in parts]
    groups = []
    bounds = _cuts(lengths)
    for first, end in zip(bounds, bounds[1:], strict=False):
        tokens = torch.zeros(end - first, micro_batch_size, lengths[first], dtype=torch.int64)
        for number, part in enumerate(parts[first:end]):
            for place, row in enumerate(part):
                tokens[number, place, : len(row)] = torch.tensor(row)
        groups.append(Group(tokens, first, tuple(lengths[first:end])))
    return tuple(groups)


def _cuts(lengths: Sequence[int]) -> list[int]:
    """Return where to cut micro-batches of falling length, so that the padded work is least.

    Every group is padded to its first length and costs ``_CALL_COST`` micro-batches more. The
    bounds do not depend on the layout, so neither does what is in a forward pass.
    """
    firsts = [n for n, length in enumerate(lengths) if n == 0 or lengths[n - 1] != length]
    ends = [*firsts, len(lengths)]
    least = [0.0] * (len(firsts) + 1)
    cut = [0] * len(firsts)
    for begin in reversed(range(len(firsts))):
        length = lengths[firsts[begin]]
        costs = [
            (ends[end] - ends[begin] + _CALL_COST) * length + least[end]
            for end in range(begin + 1, len(firsts) + 1)
        ]
        least[begin] = min(costs)
        cut[begin] = begin + 1 + costs.index(least[begin])
    bounds, place = [0], 0
    while place < len(firsts):
        place = cut[place]
        bounds.append(ends[place])
    return bounds
