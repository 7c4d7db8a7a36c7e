"""Ranks as threads of one process, each a replica by itself, for the torch-free loop.

What takes ten seconds with real ranks takes a millisecond here, so a property test can draw
hundreds of searches. Whoever waits for a rank that does not come gets an error, not a hang.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest

from megatron_mergemix.search import loop, waves

T = TypeVar("T")

_SECONDS = 10.0


class Clock:
    """Seconds that pass only where a rank lets them."""

    def __init__(self) -> None:
        self._own = threading.local()

    def perf_counter(self) -> float:
        """Return this rank's time."""
        return getattr(self._own, "now", 0.0)

    def advance(self, seconds: float) -> None:
        """Let time pass on this rank."""
        self._own.now = self.perf_counter() + seconds


class ThreadReplicas:
    """As many replicas as there are threads; every rank gets one of these."""

    def __init__(self, own: int, ranks: ThreadRanks) -> None:
        self.own = own
        self.count = ranks.count
        self.is_apart = False
        self._ranks = ranks

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Remember that replicas are on their own."""
        self.is_apart = True
        yield
        self.is_apart = False

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, by rank."""
        return self._ranks.exchange(self.own, value)


class ThreadRanks:
    """Runs a body on every rank, with ``loop`` and ``waves`` talking over threads."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.clock = Clock()
        self._barrier = threading.Barrier(count)
        self._values: list[Any] = [None] * count
        self._rank = threading.local()

    def exchange(self, rank: int, value: T) -> list[T]:
        """Return what every rank brought; all must come."""
        self._values[rank] = value
        self._barrier.wait(_SECONDS)
        values = list(self._values)
        self._barrier.wait(_SECONDS)
        return values

    def run(self, body: Callable[[ThreadReplicas], T]) -> list[T | Exception]:
        """Return by rank what the body returned or raised."""

        def on(rank: int) -> T | Exception:
            self._rank.own = rank
            try:
                return body(ThreadReplicas(rank, self))
            except Exception as error:
                return error

        with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(self.count) as threads:
            for module in (loop, waves):
                patch.setattr(module, "broadcast_object", self._broadcast)
            patch.setattr(waves, "rank", lambda: self._rank.own)
            patch.setattr(waves, "time", self.clock)
            return list(threads.map(on, range(self.count)))

    def _broadcast(self, value: T) -> T:
        return self.exchange(self._rank.own, value)[0]
