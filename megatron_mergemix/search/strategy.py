"""The contract of a strategy: it proposes mixtures and learns from trials.

A strategy never sees a model, a file or a rank. It is deterministic: the same constructor
arguments and the same trials give the same proposals, so replaying the journal resumes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_mergemix.journal import Trial


@dataclass(frozen=True)
class Proposal:
    """One mixture to be measured.

    Attributes:
        index: the trial index it will have; unique within a search, stable under replay.
        purpose: see :attr:`megatron_mergemix.journal.Trial.purpose`.
        mixture: share of training tokens per domain, sums to one; empty means the base itself.
        needs_gradient: ask the evaluator for dU/dlambda as well.
    """

    index: int
    purpose: str
    mixture: Mapping[str, float]
    needs_gradient: bool = False


@dataclass(frozen=True)
class Recommendation:
    """What a finished strategy advises, with the evidence.

    Attributes:
        mixture: the mixture to train on.
        source: which candidate won: ``"argmax"``, ``"top-k mean"``, ``"best observed"``.
        utility: its measured utility, from a real merge.
        utility_stderr: standard error of ``utility``, or None where unknown.
        alternatives: every verified candidate, the best observed trial and the prior mixtures:
            name -> {"mixture", "trial", "predicted" (before it was verified), "observed" with
            "stderr", "expected" (in the light of all trials; the highest candidate wins), "gain"
            (by how much the winner measured more) with "gain_stderr" (as if independent)}.
        surrogates: capability -> {"surrogate", "spearman", "rmse" (both leave-one-out),
            "candidates" (the same for all that were tried, or why one was refused)}.
        notes: warnings a reader must see, one sentence each.
    """

    mixture: Mapping[str, float]
    source: str
    utility: float
    utility_stderr: float | None
    alternatives: Mapping[str, Mapping[str, Any]]
    surrogates: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: Sequence[str] = ()


class Strategy(Protocol):
    """Ask/tell, in batches; see ``search/loop.py`` for how it is driven."""

    def ask(self) -> Sequence[Proposal]:
        """Return the next proposals that are not yet among the told trials.

        Proposals of one batch do not depend on each other, so they may be measured in any order
        or at the same time. Empty when :meth:`done`.
        """
        ...

    def tell(self, trials: Sequence[Trial]) -> None:
        """Replace what is known by ``trials``: all finished trials of this search, any order."""
        ...

    def done(self) -> bool:
        """Return whether nothing is left to ask."""
        ...

    def recommend(self) -> Recommendation:
        """Return the advice.

        Raises:
            SearchError: too few trials succeeded.
        """
        ...
