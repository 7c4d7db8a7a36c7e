"""The contract of a proxy: a sharded model whose weights become any merge, in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    import torch

    from megatron_mergemix.evaluate.continuations import Continuations, Prompt

T = TypeVar("T")


class Replicas(Protocol):
    """The whole live models that the ranks hold between them.

    A replica is the ranks that together hold one model. All replicas may be the same candidate
    and share its requests, or each may be a candidate of its own.
    """

    @property
    def count(self) -> int:
        """Return how many there are."""
        ...

    @property
    def own(self) -> int:
        """Return the number of the one that this rank belongs to."""
        ...

    def apart(self) -> AbstractContextManager[None]:
        """Let every replica score by itself inside the block.

        There, ``every rank`` in the contracts of proxies and evaluators means every rank of one
        replica.
        """
        ...

    def gather(self, value: T) -> list[T]:
        """Collective, on all ranks of all replicas: return every replica's value, by number.

        ``value`` is picklable and the same on all ranks of a replica.
        """
        ...


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

        Collective, over the replicas that score together. ``sequences`` is int64 ``[N, S + 1]``,
        the same on every rank, token 0 only context; the result is float64 ``[N]``, the same on
        every rank.
        """
        ...

    def token_losses(self, sequences: torch.Tensor, micro_batch_size: int) -> torch.Tensor:
        """Return the negative log-likelihood of every token in nats, float64 ``[N, S]``.

        Collective, as :meth:`sequence_losses`.
        """
        ...

    def continuation_log_probs(
        self, continuations: Continuations
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-probability of every continuation in nats, and whether it is greedy.

        Collective, as :meth:`sequence_losses`. float64 and bool, each ``[num_requests]``, the same
        on every rank; not finite where the model's logits are not.
        """
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        is_done: Callable[[int, Sequence[int]], bool],
        *,
        micro_batch_size: int,
        vocab_size: int,
    ) -> list[list[int]]:
        """Return the most likely next tokens of every prompt, one after the other.

        Collective, as :meth:`sequence_losses`.

        Args:
            prompts: what the texts begin with, and how many tokens may follow.
            is_done: told the number of a prompt and its new tokens, whether it has enough; every
                rank is told the same and must say the same.
            micro_batch_size: prompts per forward pass.
            vocab_size: ids that the tokenizer has; no other is chosen.

        Raises:
            EvaluationError: the model's logits are not finite.
        """
        ...


class MergedFrom(NamedTuple):
    """What the live model is a merge of, on disk.

    Attributes:
        base: iteration folder.
        experts: name -> (iteration folder, merge weight); without any it is the base itself.
    """

    base: Path
    experts: Mapping[str, tuple[Path, float]]


@runtime_checkable
class OnDisk(Protocol):
    """What a proxy has besides, that was read from checkpoints which are still there."""

    @property
    def merged_from(self) -> MergedFrom:
        """Return what the live model is a merge of, as it was applied last."""
        ...


@runtime_checkable
class DifferentiableProxy(Protocol):
    """What a proxy has besides, whose losses can be differentiated by the merge weights."""

    def loss_gradient(
        self, sequences: torch.Tensor, weights: torch.Tensor, micro_batch_size: int
    ) -> tuple[torch.Tensor, Mapping[str, float]]:
        """Return the loss of each sequence, and the derivative of their weighted sum.

        Collective, over all ranks of all replicas. The live model stays as it is, and no gradient
        is left in it.

        Args:
            sequences: as for :meth:`Proxy.sequence_losses`.
            weights: float64 ``[N]``, the same on every rank.
            micro_batch_size: sequences per pass.

        Returns:
            What :meth:`Proxy.sequence_losses` returns, and for every expert k
            ``d(sum_n weights[n] loss_n) / d alpha_k`` in the present weights, in nats; both are
            the same on every rank.
        """
        ...
