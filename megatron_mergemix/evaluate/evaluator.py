"""The contract between the search loop and whatever scores a candidate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from megatron_mergemix.trials import Minibatch, Scores

if TYPE_CHECKING:
    from megatron_mergemix.evaluate.proxy import DifferentiableProxy, Proxy


class Evaluator(Protocol):
    """Scores the model that a proxy currently is.

    An evaluator is built once per job and reused for every candidate, so whatever does not
    depend on the weights (tokenised requests, fixed batches) is prepared in its constructor.
    """

    def evaluate(self, proxy: Proxy) -> Scores:
        """Return the scores of the proxy's present weights.

        Collective: every rank calls it and every rank gets the same scores. Where replicas score
        candidates of their own, this holds for the ranks of each by themselves.

        Raises:
            EvaluationError: this candidate cannot be scored; raised on every rank alike. The
                trial is marked failed and the search goes on. Anything else ends the job.
        """
        ...


class SplitEvaluator(Evaluator, Protocol):
    """An evaluator that keeps some of its items away from the search."""

    def evaluate_held_out(self, proxy: Proxy) -> Scores:
        """Return the scores on items that :meth:`Evaluator.evaluate` never scores.

        Collective, over all ranks of all replicas. Capabilities without such items are left out.

        Raises:
            EvaluationError: as for :meth:`Evaluator.evaluate`.
        """
        ...


@runtime_checkable
class Subsampled(Protocol):
    """What an evaluator has besides, that scores the first share of its items by itself."""

    def evaluate_first(self, proxy: Proxy) -> Scores:
        """Return the scores on the first share of the items, the same for every candidate.

        Collective, as :meth:`Evaluator.evaluate`. A capability that cannot be divided is scored
        as a whole.

        Raises:
            EvaluationError: as for :meth:`Evaluator.evaluate`.
        """
        ...

    def evaluate_others(self, proxy: Proxy, first: Scores) -> Scores:
        """Return the scores on all items, as :meth:`Evaluator.evaluate`, for less work.

        Collective, as :meth:`Evaluator.evaluate`.

        Args:
            proxy: the same candidate as before.
            first: what :meth:`evaluate_first` returned of it.

        Raises:
            EvaluationError: as for :meth:`Evaluator.evaluate`.
        """
        ...


@runtime_checkable
class NamesCandidates(Protocol):
    """What an evaluator has besides, that keeps files of every candidate."""

    def begin(self, name: str) -> None:
        """Say what the candidate that is scored next is called: ``trial-017``."""
        ...


Slopes = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Capability -> metric -> expert -> derivative of the score by the expert's merge weight."""


@runtime_checkable
class DifferentiableEvaluator(Protocol):
    """What an evaluator has besides, whose scores are differentiable in the merge weights."""

    def gradients(self, proxy: DifferentiableProxy, minibatch: Minibatch) -> tuple[Scores, Slopes]:
        """Return the scores of a minibatch and their derivatives in the proxy's present weights.

        Collective, over all ranks of all replicas: every rank gets the same.

        Raises:
            EvaluationError: as for :meth:`Evaluator.evaluate`.
        """
        ...
