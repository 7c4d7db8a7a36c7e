"""What ranks need to agree: who I am, one object for all, and failing together.

Torch is imported inside the functions, so that torch-free rooms may import this module. Without
an initialised process group every function behaves as on a single rank.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar, cast

from megatron_mergemix.errors import MergeMixError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


def rank() -> int:
    """Return this process's rank, 0 without a process group."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_initialized() else 1


_objects_of: tuple[ProcessGroup | None, ProcessGroup] | None = None
"""The group of all ranks, and the one made beside it."""


def _group_for_objects() -> ProcessGroup:
    """Collective, the first time: return the group over which ranks exchange objects, not tensors.

    One rank may fit a surrogate, load tasks or wait for a program while the others wait for its
    word, longer than a collective of NCCL may take, and without a GPU that spins meanwhile. That
    a rank died is noticed all the same: its connections close.
    """
    global _objects_of
    import torch.distributed as dist

    if _objects_of is None or _objects_of[0] is not dist.group.WORLD:
        group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
        _objects_of = dist.group.WORLD, group
    return _objects_of[1]


def broadcast_object(value: T) -> T:
    """Collective: return the picklable ``value`` of rank 0 on every rank."""
    import torch.distributed as dist

    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_group_for_objects())
    return box[0]


def from_all(value: T) -> list[T]:
    """Collective: return the picklable value of every rank, by rank."""
    import torch.distributed as dist

    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value, group=_group_for_objects())
    return cast("list[T]", values)


def fail_together(error: Exception | None) -> None:
    """Collective: raise on every rank if any rank brings an error.

    A rank raises its own error; the others raise the first foreign one, naming its rank. Without
    this, one rank raises and the others wait for it in their next collective.
    """
    messages = from_all(None if error is None else _describe(error))
    if error is not None:
        raise error
    for index, message in enumerate(messages):
        if message is not None:
            raise MergeMixError(f"rank {index}: {message}")


@contextmanager
def together() -> Iterator[None]:
    """Collective: run a block without collectives; if it raises on one rank, all ranks raise."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    fail_together(error)


def from_rank_0(make: Callable[[], T]) -> T:
    """Collective: return what ``make`` returns on rank 0; what it raises there, all ranks raise.

    For what is read from files: on a network file system ranks may see different ones.
    """
    value: T | None = None
    with together():
        if rank() == 0:
            value = make()
    return cast("T", broadcast_object(value))


@contextmanager
def held_by_rank_0(resource: AbstractContextManager[object]) -> Iterator[None]:
    """Collective: run a block while rank 0 holds ``resource``; if it cannot, all ranks raise.

    For locks: one job is one owner, however many ranks it has. Rank 0 lets go when its own block
    ends, so the block's last step should be one that all ranks wait for.
    """
    with ExitStack() as stack:
        with together():
            if rank() == 0:
                stack.enter_context(resource)
        yield


def leave_process_groups() -> None:
    """Take process groups down while the interpreter runs; Megatron leaves them to its end.

    A thread of gloo that drops the tensors of its last collective needs the interpreter. Once that
    is on its way out, Python ends the thread inside a destructor and the process aborts, all its
    work done: one in ten evaluations on two ranks.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        if parallel_state := sys.modules.get("megatron.core.parallel_state"):
            parallel_state.destroy_model_parallel()  # holds them as well
        dist.destroy_process_group()


def _describe(error: Exception) -> str:
    text = str(error)
    return text if isinstance(error, MergeMixError) else f"{type(error).__name__}: {text}"
