"""The contract of a proxy: a sharded model whose weights become any merge, in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Proxy(Protocol):
    """Base and experts, resident on the ranks, and the one live model they are merged into."""

    def apply(self, merge_weights: Mapping[str, float]) -> float:
        """Make the live model ``base + sum_k alpha_k (expert_k - base)``.

        Every rank must call it; there is no communication. No weights at all give the base, bit
        for bit.

        Returns:
            The L2 norm of the applied task vector over the whole model.
        """
        ...

    def sequence_losses(self, sequences: torch.Tensor, micro_batch_size: int) -> torch.Tensor:
        """Return the summed negative log-likelihood of each sequence in nats.

        Collective. ``sequences`` is int64 ``[N, S + 1]``, the same on every rank, token 0 only
        context; the result is float64 ``[N]``, the same on every rank.
        """
        ...
