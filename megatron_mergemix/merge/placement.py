"""Where the resident copies of base and experts lie: device, pinned host memory, or a file.

No torch is imported on loading, so that a plan follows the same rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil

from megatron_mergemix.errors import MergeMixError

if TYPE_CHECKING:
    import torch

Place = Literal["device", "host", "file"]

PLACES: tuple[Place, ...] = ("device", "host", "file")
"""From the fastest to the slowest."""

KEPT_FREE = 0.15
"""Share of a memory that stays free of copies: activations, the allocator's gaps, other work."""

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Room:
    """What one rank may fill, in bytes.

    Attributes:
        device: of its own device's memory.
        host: its share of this machine's memory; equal to ``device`` on the CPU.
    """

    device: int
    host: int


def room_on(device: torch.device, ranks_on_machine: int) -> Room:
    """Return what this rank may fill.

    Args:
        device: where the live parameters are.
        ranks_on_machine: that share this machine's memory, all of them filling it alike.
    """
    host = int(max(0.0, host_free() - KEPT_FREE * psutil.virtual_memory().total))
    host //= ranks_on_machine
    if device.type == "cpu":
        return Room(host, host)
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return Room(int(max(0.0, free - KEPT_FREE * total)), host)


def choose_place(wish: str, needed: int, room: Room, device_type: str) -> Place:
    """Return the fastest place that holds ``needed`` bytes, or the wished one.

    Args:
        wish: ``auto`` or a place.
        needed: bytes of all copies of this rank.
        room: what the rank may fill.
        device_type: ``cpu`` or ``cuda``, where the live parameters are.

    Raises:
        MergeMixError: the wished place is too small.
    """
    if wish == "auto":
        if needed <= room.device:
            return "device"
        return "host" if device_type != "cpu" and needed <= room.host else "file"
    place = next(place for place in PLACES if place == wish)
    size = {"device": room.device, "host": room.host}.get(place)
    if size is not None and needed > size:
        raise MergeMixError(
            f"search.resident is {wish}, but base and experts take {_gib(needed)} on this rank and "
            f"{_gib(size)} of that memory may be filled ({KEPT_FREE:.0%} stay free). Use "
            "search.resident: auto, more tensor or pipeline ranks, or more machines."
        )
    return place


def describe(place: Place, needed: int, room: Room, device: torch.device, folder: Path) -> str:
    """Return for people where ``needed`` bytes are held, and what else there was."""
    where = {
        "device": "in the memory of this machine" if device.type == "cpu" else "on the device",
        "host": "in pinned host memory",
        "file": f"in a file in {folder}, mapped into memory",
    }[place]
    rooms = f"{_gib(room.device)} free for them on the device, {_gib(room.host)} on the host"
    if device.type == "cpu":
        rooms = f"{_gib(room.host)} free for them"
    return f"{_gib(needed)} on the fullest rank, held {where} ({rooms})"


def host_free() -> float:
    """Return the bytes of memory that may still be taken, by this job's control group if it has
    a limit."""
    free = float(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        statistics = (_CGROUP / "memory.stat").read_text().split()
        cached = int(statistics[statistics.index("inactive_file") + 1])
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, max(0.0, int(limit) - used + cached))


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
