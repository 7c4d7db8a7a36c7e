"""Continuations to be scored, cut into micro-batches once, before any model is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_mergemix.evaluate.families import Family, Row, by_itself, families, fixed_order
from megatron_mergemix.evaluate.micro_batches import Group, grouped, micro_batches

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
class Continuations:
    """Token requests as micro-batches; the same on every rank, and under every layout.

    A *slot* is a position of a row whose next token is asked for, a *target* one of the tokens
    that is asked for there. Slots are numbered by pass, row and position, targets by slot, so that
    those of a pass are neighbours.

    Attributes:
        groups: the micro-batches, longest rows first.
        slot_rows: the row within the micro-batch of every slot, int64.
        slot_positions: the position in its pass of every slot, int64.
        slot_starts: first slot of every pass, and the number of slots.
        target_slots: the slot of every target, int64.
        target_tokens: its token, int64.
        target_starts: first target of every pass, and the number of targets.
        request_targets: the targets of all requests one after the other, int64.
        requests: the request that each of these belongs to, int64.
        num_requests: how many requests there are.
        vocab_size: ids that the tokenizer has; rows of the embedding beyond are padding.
        shared: the same with shared contexts; None where no two rows share one.
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
    vocab_size: int
    shared: Shared | None = None

    def work(self, at_once: int, is_uniform: bool, least: int) -> int:
        """Return the tokens that are run, with padding, by one data-parallel rank alone.

        Args:
            at_once: micro-batches that keep their contexts at the same time.
            is_uniform: whether micro-batches of one call must be of one length.
            least: tokens that a pass over fewer takes as long as.
        """
        total = 0
        for group in self.groups:
            size, count = len(group.passes[0][0]), len(group.begins)
            step = 1 if not is_uniform else at_once if group.keeps else count
            for start in range(0, count, step):
                places = range(start, min(start + step, count))
                lengths = group.of_one_length(places)
                total += len(places) * sum(max(least, size * length) for length in lengths)
        return total

    @property
    def longest_kept(self) -> int:
        """Return how many tokens of a text are kept at most; 0 where none are."""
        return max((group.reach for group in self.groups if group.keeps), default=0)


@dataclass(frozen=True)
class Shared:
    """Requests laid out for a model that keeps keys and values: contexts are run once.

    Attributes:
        continuations: all of them.
        sample: some of them, laid out so.
        sample_by_rows: the same ones, each row by itself, to tell whether a model answers alike.
        goes_on: of every entry of the samples' ``request_targets``, whether it is read from a pass
            that goes on from kept keys.
    """

    continuations: Continuations
    sample: Continuations
    sample_by_rows: Continuations
    goes_on: torch.Tensor


def prepare(
    requests: Sequence[Request], *, max_length: int, micro_batch_size: int, vocab_size: int
) -> Continuations:
    """Return the requests as micro-batches.

    A row is run once for all requests that can be read from it: identical ones, ones that differ
    in their last token alone (the letters of a multiple choice), and ones whose tokens begin
    another row, which a causal model cannot tell from that row's beginning. For models that keep
    keys and values there is a second layout, in which a context of several rows (the choices of a
    question) is run once; all rows of a micro-batch go on from as many tokens as its shortest
    context has.

    Args:
        requests: contexts longer than fits are cut on the left.
        max_length: tokens that the model sees at once; no continuation is longer.
        micro_batch_size: rows per forward pass.
        vocab_size: ids that the tokenizer has.
    """
    assert all(request.context and request.continuation for request in requests)
    assert all(len(request.continuation) <= max_length for request in requests)
    laid_out = partial(_laid_out, max_length, micro_batch_size, vocab_size)
    asked = [
        (tuple(tokens), len(tokens) - len(continuation))
        for context, continuation in requests
        for tokens in [(*context, *continuation)[-max_length - 1 :]]
    ]
    home = _homes({tokens[:-1] for tokens, _ in asked})
    by_rows = laid_out(asked, home, [by_itself(row) for row in set(home.values())])
    found = families([(tokens[:-1], length) for tokens, length in asked], home)
    sharing = fixed_order([family for family in found if family.shared])
    if not sharing:
        return by_rows
    some = {*sharing[:micro_batch_size], *sharing[-micro_batch_size:]}
    rows = {row for family in some for row in family.rows}
    few = [each for each in asked if home[each[0][:-1]] in rows]
    sample = laid_out(few, home, list(some))
    return replace(
        by_rows,
        shared=Shared(
            laid_out(asked, home, found),
            sample,
            laid_out(few, home, [by_itself(row) for row in rows]),
            _goes_on(sample),
        ),
    )


def _goes_on(found: Continuations) -> torch.Tensor:
    later = torch.zeros(len(found.slot_starts) - 1, dtype=torch.bool)
    for group in found.groups:
        count = len(group.begins)
        later[group.first + count : group.first + count * len(group.passes)] = True
    starts = torch.tensor(found.slot_starts[1:])
    passes = torch.searchsorted(starts, found.target_slots[found.request_targets], right=True)
    return later[passes]


def _laid_out(
    max_length: int,
    micro_batch_size: int,
    vocab_size: int,
    asked: Sequence[tuple[Row, int]],
    home: Mapping[Row, Row],
    found: Sequence[Family],
) -> Continuations:
    """Return requests, each its tokens and how many are context, as micro-batches of families."""
    batches = micro_batches(fixed_order(found), micro_batch_size)
    groups, places = grouped(batches, max_length, micro_batch_size)
    counts = [len(tokens) - length for tokens, length in asked]
    where = np.array([places[home[tokens[:-1]]] for tokens, _ in asked], np.int64).reshape(-1, 4)
    first, own, begins, row = np.repeat(where, counts, axis=0).T
    positions = np.concatenate(
        [np.arange(length - 1, len(tokens) - 1) for tokens, length in asked] or [first]
    )
    is_first = positions < begins
    columns = (  # pass, row, position, token
        np.where(is_first, first, own),
        row,
        np.where(is_first, positions, positions - begins),
        np.fromiter(chain.from_iterable(tokens[length:] for tokens, length in asked), np.int64),
    )
    targets, request_targets = _distinct(np.stack(columns, axis=1))
    slots, target_slots = _distinct(targets[:, :3])

    num_passes = sum(len(group.passes) * len(group.begins) for group in groups)
    starts = np.arange(num_passes + 1)
    return Continuations(
        groups=groups,
        slot_rows=torch.from_numpy(slots[:, 1].copy()),
        slot_positions=torch.from_numpy(slots[:, 2].copy()),
        slot_starts=tuple(np.searchsorted(slots[:, 0], starts).tolist()),
        target_slots=torch.from_numpy(target_slots),
        target_tokens=torch.from_numpy(targets[:, 3].copy()),
        target_starts=tuple(np.searchsorted(targets[:, 0], starts).tolist()),
        request_targets=torch.from_numpy(request_targets),
        requests=torch.from_numpy(np.repeat(np.arange(len(asked)), counts)),
        num_requests=len(asked),
        vocab_size=vocab_size,
    )


def _homes(inputs: set[Row]) -> dict[Row, Row]:
    """Return for every input the longest one that begins with it."""
    home: dict[Row, Row] = {}
    following: Row = ()
    for row in sorted(inputs, reverse=True):  # what begins with a row comes right before it
        home[row] = home[following] if following[: len(row)] == row else row
        following = row
    return home


def _distinct(rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the distinct rows in order, and the place of every row among them."""
    distinct, places = np.unique(rows, axis=0, return_inverse=True)
    return distinct, places.reshape(-1).astype(np.int64)
