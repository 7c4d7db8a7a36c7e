"""How replicas of the model divide a batch of proposals: one at a time, or a wave of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Literal

from megatron_mergemix.evaluate.proxy import Replicas
from megatron_mergemix.processes.distributed import broadcast_object, rank
from megatron_mergemix.search.strategy import Proposal
from megatron_mergemix.trials import Trial

Divided = Literal["auto", "candidates", "requests"]


_Items = tuple[bool, bool]


def _items(proposal: Proposal) -> _Items:
    """Return which items a candidate is scored on: a first share, what that left, or all."""
    return proposal.first is not None, bool(proposal.begun)


class Waves:
    """Measures proposals one after the other, or as many at a time as there are replicas.

    Either all replicas share the requests of one candidate, or each scores a candidate of its own
    on all requests. The trials are the same either way, and so is their order.

    ``auto`` measures both in the running search: the first candidate warms everything up, the
    second is timed shared, and so is the first full wave apart. From then on a wave, full or not,
    goes the way that takes less. Candidates that are scored on a share of the items, or on what
    that left, are waves of their own and compared with their like. Rank 0's clock decides for all
    ranks.
    """

    def __init__(
        self,
        measure: Callable[[Proposal], Trial],
        replicas: Replicas | None,
        divided: Divided,
    ) -> None:
        """Prepare.

        Args:
            measure: merges and scores one mixture on the replicas that take part; it returns a
                failed trial where the candidate cannot be scored.
            replicas: of the model that the ranks hold; None for a single one.
            divided: what replicas divide among them, see ``search.replicas``.
        """
        self._measure = measure
        self._replicas = replicas if replicas is not None and replicas.count > 1 else None
        self._divided = divided
        self._is_warm = False
        self._shared: dict[_Items, float] = {}
        self._both: tuple[float, float] | None = None
        if self._replicas is not None and divided != "auto":
            self._tell(divided == "candidates", "as search.replicas says")

    def measure(self, proposals: Sequence[Proposal]) -> Iterator[Trial]:
        """Collective: yield one trial per proposal, in their order, the same on every rank."""
        rest = list(proposals)
        while rest:
            size = broadcast_object(self._wave_size(rest))
            wave, rest = rest[: size or 1], rest[size or 1 :]
            start = time.perf_counter()
            trials = self._measure_apart(wave) if size else [self._measure(wave[0])]
            # Neither a failure nor a backward pass tells what it takes to score a candidate.
            if not wave[0].needs_gradient and not any(trial.error for trial in trials):
                self._learn(_items(wave[0]), size, time.perf_counter() - start)
            yield from trials

    def _measure_apart(self, wave: Sequence[Proposal]) -> list[Trial]:
        """Collective: measure one proposal on every replica, as far as they reach."""
        assert self._replicas is not None
        own: Trial | None = None
        with self._replicas.apart():
            if self._replicas.own < len(wave):
                own = self._measure(wave[self._replicas.own])
        return [trial for trial in self._replicas.gather(own) if trial is not None]

    def _wave_size(self, rest: Sequence[Proposal]) -> int:
        """Return how many of the next proposals are measured apart; 0 for one that is shared."""
        if self._replicas is None:
            return 0
        items = _items(rest[0])
        alike = takewhile(lambda p: not p.needs_gradient and _items(p) == items, rest)
        size = min(self._replicas.count, len(list(alike)))
        if self._divided != "auto":
            return size if self._divided == "candidates" else 0
        if self._both is None:
            return size if items in self._shared and size == self._replicas.count else 0
        shared, apart = self._both
        return size if apart < size * shared else 0

    def _learn(self, items: _Items, size: int, seconds: float) -> None:
        """Note how long the first of each kind took, and tell when both are known."""
        if self._replicas is None or self._divided != "auto" or self._both is not None:
            return
        if size == 0 and self._is_warm:
            self._shared.setdefault(items, seconds)
        self._is_warm = True
        if size == self._replicas.count and items in self._shared:
            self._both = self._shared[items], seconds
            each, together = seconds / size, self._shared[items]
            if each < together:
                why = f"{each:.2f} s per candidate, {together:.2f} s when they share one"
            else:
                why = f"{together:.2f} s per candidate, {each:.2f} s when each scores its own"
            self._tell(each < together, why)

    def _tell(self, apart: bool, why: str) -> None:
        if rank() == 0 and self._replicas is not None:
            how = ", each scores candidates of its own" if apart else " share every candidate"
            print(f"search: {self._replicas.count} replicas{how}: {why}", flush=True)
