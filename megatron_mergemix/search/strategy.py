"""The contract of a strategy: it proposes mixtures and learns from trials.

A strategy never sees a model, a file or a rank. It is deterministic: the same constructor
arguments and the same trials give the same proposals, so replaying the journal resumes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_mergemix.trials import Minibatch, Scores, Trial


@dataclass(frozen=True)
class Proposal:
    """One mixture to be measured.

    Attributes:
        index: the trial index it will have; unique within a search, stable under replay.
        purpose: see :attr:`megatron_mergemix.trials.Trial.purpose`.
        mixture: share of training tokens per domain, sums to one; empty means the base itself.
        minibatch: ask for the gradient of the scores on these items, instead of all scores.
        first: ask for the scores on this share of the items alone.
        begun: the scores on their first share, which were measured before; ask for the others,
            and for the scores on all.
    """

    index: int
    purpose: str
    mixture: Mapping[str, float]
    minibatch: Minibatch | None = None
    first: float | None = None
    begun: Scores | None = None

    @property
    def needs_gradient(self) -> bool:
        """Return whether a backward pass is asked for."""
        return self.minibatch is not None

    @property
    def is_whole(self) -> bool:
        """Return whether the scores on all items are asked for at once."""
        return self.minibatch is None and self.first is None and self.begun is None


@dataclass(frozen=True)
class Recommendation:
    """What a finished strategy advises, with the evidence.

    Attributes:
        mixture: the mixture to train on.
        source: which candidate won: ``"argmax"``, ``"top-k mean"`` or ``"best observed"``; of a
            descent ``"last"`` or ``"mean"``, of groups ``"composed"``, ``"joint"`` or ``"coarse"``.
        utility: its measured utility, from a real merge.
        utility_stderr: standard error of ``utility``, or None where unknown.
        interval: central 95 % interval of its true utility, in the light of all trials. Like
            ``better_than`` and ``as_good`` it is read off the posterior of surrogates, see
            :mod:`megatron_mergemix.search.uncertainty`.
        better_than: ``"uniform"``, ``"proportional"``, ``"best observed"`` -> the probability
            that its true utility exceeds that of the other; one that is itself is left out.
        as_good: the mixtures within the bounds that it is not better than with a probability of
            0.95: {"share" of all that are possible, by volume, "least" and "largest" share per
            domain among them, "nearest": {"proportional" and "uniform": the one nearest to it}}.
        items: what "true" means: on ``"new items"`` like those of the search, where the trials
            kept their per-item scores; else on ``"the search's items"``, which all trials share.
        alternatives: every verified candidate, the best observed trial and the prior mixtures:
            name -> {"mixture", "trial", "predicted" (before it was verified), "observed" with
            "stderr", "expected" (in the light of all trials), "gain"
            (by how much the winner measured more) with "gain_stderr" (as if independent)}.
        surrogates: capability -> {"surrogate", "spearman", "rmse" (both leave-one-out),
            "candidates" (the same for all that were tried, or why one was refused), and with
            ``search.ensemble`` "ensemble" (whether it was used, with errors)}.
        notes: warnings a reader must see, one sentence each.
    """

    mixture: Mapping[str, float]
    source: str
    utility: float
    utility_stderr: float | None
    alternatives: Mapping[str, Mapping[str, Any]]
    interval: tuple[float, float]
    better_than: Mapping[str, float]
    as_good: Mapping[str, Any]
    items: str
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
