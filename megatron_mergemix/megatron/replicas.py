"""Which ranks together hold one live model, and what they score by themselves or all together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch.distributed as dist

from megatron_mergemix.errors import ConfigError
from megatron_mergemix.processes.distributed import broadcast_object, from_all, rank, world_size

T = TypeVar("T")


@dataclass(frozen=True)
class DataRanks:
    """The data-parallel ranks, this one among them, that sequences are dealt out to.

    Attributes:
        size: how many.
        own: this rank's place among them.
        group: their process group, None for one rank alone.
    """

    size: int
    own: int
    group: dist.ProcessGroup | None


def all_data_ranks() -> DataRanks:
    """Return the data-parallel ranks of all replicas."""
    from megatron.core import parallel_state

    return DataRanks(
        parallel_state.get_data_parallel_world_size(),
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_group(),
    )


class Replicas:
    """The whole live models that the ranks hold between them.

    A replica is all ranks that wait for each other in a forward pass: its tensor, pipeline and
    context ranks, and the data-parallel ranks that MoE experts are spread over.

    Attributes:
        count: how many there are.
        own: the number of the one that this rank belongs to.
        data_ranks: those between which this rank's sequences are dealt out now.
    """

    def __init__(self, divided: str = "auto") -> None:
        """Collective: find the replicas, and make process groups where Megatron has none.

        Args:
            divided: ``search.replicas``.

        Raises:
            ConfigError: candidates are to be divided among replicas, but there is only one.
        """
        members = joined(_all_forward_groups())
        self.count = len(members)
        (self.own,) = (n for n, ranks in enumerate(members) if rank() in ranks)
        if divided == "candidates" and self.count == 1:
            raise ConfigError(
                f"search.replicas is candidates, but the {world_size()} ranks of this job hold one "
                "model between them. Use search.replicas: auto, or more data-parallel ranks."
            )
        self._all = self.data_ranks = all_data_ranks()
        self._apart = self._all if self.count == 1 else _data_ranks_within(members[self.own])
        self._firsts = [ranks[0] for ranks in members]

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Let every replica score by itself inside the block."""
        self.data_ranks = self._apart
        try:
            yield
        finally:
            self.data_ranks = self._all

    def gather(self, value: T) -> list[T]:
        """Collective, on all ranks of all replicas: return every replica's value, by number.

        Replicas wait here for each other for as long as one needs.
        """
        if self.count == 1:
            return [broadcast_object(value)]
        values = from_all(value if rank() in self._firsts else None)
        return [cast("T", values[first]) for first in self._firsts]


def joined(groups: Iterable[Sequence[int]]) -> list[list[int]]:
    """Return the ranks that groups connect, also over several; sorted, by their first rank."""
    found: list[set[int]] = []
    for group in groups:
        merged = set(group)
        apart = []
        for other in found:
            if merged & other:
                merged |= other
            else:
                apart.append(other)
        found = [*apart, merged]
    return sorted(sorted(ranks) for ranks in found)


def _all_forward_groups() -> list[tuple[int, ...]]:
    """Collective: return the groups of all ranks that are at work in a forward pass."""
    from megatron.core import parallel_state

    mine = [
        tuple(dist.get_process_group_ranks(group))
        for group in (
            parallel_state.get_model_parallel_group(),
            parallel_state.get_context_parallel_group(),
            parallel_state.get_expert_tensor_model_pipeline_parallel_group(),
        )
    ]
    return sorted({group for groups in from_all(mine) for group in groups})


def _data_ranks_within(replica: Sequence[int]) -> DataRanks:
    """Collective: return the data-parallel ranks beside this one that belong to its replica."""
    from megatron.core import parallel_state

    data = dist.get_process_group_ranks(parallel_state.get_data_parallel_group())
    mine = tuple(each for each in data if each in set(replica))
    own_group: dist.ProcessGroup | None = None
    for ranks in sorted(set(from_all(mine))):  # every rank takes part in making every group
        if len(ranks) > 1:
            group = dist.new_group(list(ranks))
            own_group = group if ranks == mine else own_group
    return DataRanks(len(mine), mine.index(rank()), own_group)
