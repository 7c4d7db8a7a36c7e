"""Children of a test's ranks, where seconds of importing would be most of what a test takes."""

from __future__ import annotations

from multiprocessing.context import ForkProcess, SpawnProcess


def fork_what_would_be_spawned() -> None:
    """Make this process and those it forks fork where they ask for a fresh interpreter.

    Megatron's checkpoint writer asks for one, to serve a queue, on every rank that saves: four
    seconds in which it imports torch again. Ranks that torchrun starts still spawn.
    """
    SpawnProcess._Popen = staticmethod(ForkProcess._Popen)  # type: ignore[method-assign]
