"""Ways to do with less work, trusted once a model was seen to answer alike with them.

Kernels that Megatron's attention calls are not the same on all machines, so that what goes on from
kept keys and values is tried once per model, against passes over whole texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from megatron_mergemix.megatron.device import device
from megatron_mergemix.megatron.replicas import DataRanks


class Trust(IntEnum):
    """How far a way is trusted; of several ranks, as far as the least does."""

    WRONG = 0
    UNTRIED = 1
    RIGHT = 2


class Trusted:
    """What is known of one way, by model.

    Replicas that have worked apart may know different things, and agree before they work together.
    """

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[torch.nn.Module, Trust] = WeakKeyDictionary()

    def own(self, chunks: Sequence[torch.nn.Module]) -> Trust:
        """Return what this rank knows of its model."""
        return self._known.get(chunks[0], Trust.UNTRIED)

    def agreed(
        self, chunks: Sequence[torch.nn.Module], serves: bool, data_ranks: DataRanks
    ) -> Trust:
        """Collective: return the least trust of all ranks that work together.

        Args:
            chunks: this rank's model chunks.
            serves: whether this rank's layers are made for it.
            data_ranks: the data-parallel ranks that work together.
        """
        from megatron.core import parallel_state

        least = torch.tensor(float(self.own(chunks) if serves else Trust.WRONG))
        least = least.to(device())
        for group in (parallel_state.get_model_parallel_group(), data_ranks.group):
            if group is not None:
                dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
        return Trust(int(least.item()))

    def settle(self, chunks: Sequence[torch.nn.Module], wrong: str, data_ranks: DataRanks) -> None:
        """Keep what was seen: nothing wrong where ``wrong`` is empty; else say it, on one rank."""
        from megatron.core import parallel_state

        self._known[chunks[0]] = Trust.WRONG if wrong else Trust.RIGHT
        first = dist.get_rank(parallel_state.get_model_parallel_group()) == 0
        if wrong and first and data_ranks.own == 0:
            print(
                f"warning: {wrong} This is a bug of megatron-mergemix or of a library; please "
                "report it.",
                flush=True,
            )
