"""Log-probabilities of continuations under any parallel layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_mergemix.evaluate.continuations import Continuations
from megatron_mergemix.megatron import kv_cache
from megatron_mergemix.megatron.dist_checkpoint import unwrap
from megatron_mergemix.megatron.passes import measure, work
from megatron_mergemix.megatron.replicas import DataRanks, all_data_ranks
from megatron_mergemix.megatron.trust import Trust, Trusted

_ALIKE, _ALIKE_IN_HALF = 0.01, 0.1
"""By how much, in nats, three of four tokens may differ by rounding where contexts are shared; the
latter where parameters have 16 bits. There a token may take other MoE experts, too."""

_trusted = Trusted()


def continuation_log_probs(
    chunks: Sequence[torch.nn.Module],
    continuations: Continuations,
    data_ranks: DataRanks | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probability of every continuation in nats, and whether it is greedy.

    Collective: every rank passes the same continuations and gets the same result; see
    :func:`.passes.measure`. A context that several continuations share is run once where the
    model's attention can go on from what it keeps.

    Args:
        chunks: this rank's model chunks.
        continuations: what is asked for.
        data_ranks: the data-parallel ranks that score together; None for all.

    Returns:
        float64 and bool, each ``[num_requests]``, on the CPU. NaN and False where the model's
        logits are not finite.
    """
    data_ranks = data_ranks or all_data_ranks()
    if _may_share(chunks, continuations, data_ranks):
        assert continuations.shared is not None
        continuations = continuations.shared.continuations
    return _by_request(chunks, continuations, data_ranks)


def _by_request(
    chunks: Sequence[torch.nn.Module], asked: Continuations, data_ranks: DataRanks
) -> tuple[torch.Tensor, torch.Tensor]:
    log_probs, best = measure(chunks, asked, data_ranks)
    places, requests = asked.request_targets, asked.requests
    sums = torch.zeros(asked.num_requests, dtype=torch.float64)
    sums.index_add_(0, requests, log_probs[places])
    other = torch.zeros(asked.num_requests, dtype=torch.int64)
    missed = best[asked.target_slots] != asked.target_tokens
    other.index_add_(0, requests, missed[places].long())
    return sums, other == 0


def _may_share(
    chunks: Sequence[torch.nn.Module], asked: Continuations, data_ranks: DataRanks
) -> bool:
    """Collective: return whether contexts are shared: that is less work, and was seen to be right.

    The first candidate's answers to some requests are compared with those of whole rows.
    """
    shared = asked.shared
    if shared is None or work(chunks[0], shared.continuations) >= work(chunks[0], asked):
        return False
    trust = _trusted.agreed(chunks, kv_cache.serves_many_tokens(chunks), data_ranks)
    if trust is not Trust.UNTRIED:
        return trust is Trust.RIGHT
    by_rows, found = (
        measure(chunks, sample, data_ranks)[0][sample.request_targets]
        for sample in (shared.sample_by_rows, shared.sample)
    )
    if not by_rows.isfinite().all():
        return False  # the model itself is broken, and says nothing about its keys
    gaps = (found - by_rows).abs().nan_to_num(torch.inf)[shared.goes_on]
    gap = gaps.quantile(0.75).item()
    model: Any = unwrap(chunks[0])
    is_exact = model.config.params_dtype == torch.float32
    is_alike = gap <= (_ALIKE if is_exact else _ALIKE_IN_HALF)
    wrong = (
        f"choices that share their context differ by {gap:.2g} nats per token from those that are "
        "run one by one, so that every choice costs a pass over its whole text."
    )
    _trusted.settle(chunks, "" if is_alike else wrong, data_ranks)
    return is_alike


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
    _, best = measure(chunks, continuations, data_ranks or all_data_ranks())
    return best[continuations.target_slots[continuations.request_targets]]
