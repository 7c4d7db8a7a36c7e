"""Processes that end with the one that started them, and what they must not inherit."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Mapping

_PARENT = "_MERGEMIX_PARENT"
_PR_SET_PDEATHSIG = 1

_OF_TORCHRUN = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)


def without_torchrun(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without what would make a process take itself for a rank of a job."""
    return {
        name: value
        for name, value in environment.items()
        if name not in _OF_TORCHRUN and not name.startswith("TORCHELASTIC_")
    }


def tell_children_their_parent() -> None:
    """Tell processes that this one spawns who they were spawned by, should it die meanwhile."""
    os.environ[_PARENT] = str(os.getpid())


def die_with_spawner() -> None:
    """As :func:`die_with_parent`, for one spawned after :func:`tell_children_their_parent`."""
    die_with_parent(int(os.environ[_PARENT]))


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel to kill this process when its parent dies, so that no rank is orphaned.

    Linux only; elsewhere it does nothing, and an orphaned rank ends at its next collective.

    Args:
        parent: the process that started this one, where it may have died meanwhile.
    """
    parent = os.getppid() if parent is None else parent
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:  # the parent died before the call
        os._exit(1)
