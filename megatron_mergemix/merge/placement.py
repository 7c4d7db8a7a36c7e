"""Where the resident copies of base and experts lie: device, pinned host memory, or a file.

No torch is imported on loading, so that a plan follows the same rule.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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
"""Share of a memory that stays free of copies: the allocator's gaps, other work; on the CPU
activations, too."""

_CGROUP = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")

_CGROUP_FILES = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""By controller, which version 2 does not name: the folder in ``_CGROUP``, the files of limit and
use, and which entry of ``memory.stat`` is a cache of files that makes room where it is needed."""


@dataclass(frozen=True)
class Room:
    """What one rank may fill, in bytes.

    Attributes:
        device: of its own device's memory.
        host: its share of this machine's memory; equal to ``device`` on the CPU.
    """

    device: int
    host: int


def room_on(device: torch.device, ranks_on_machine: int, wanted: int = 0) -> Room:
    """Return what this rank may fill.

    Args:
        device: where the live parameters are.
        ranks_on_machine: that share this machine's memory, all of them filling it alike.
        wanted: bytes of the device that this rank will take besides.
    """
    host = int(host_room()) // ranks_on_machine
    if device.type == "cpu":
        host = max(0, host - wanted)
        return Room(host, host)
    import torch

    torch.cuda.empty_cache()  # what its allocator holds for later counts as taken
    free, total = torch.cuda.mem_get_info(device)
    return Room(int(max(0.0, free - KEPT_FREE * total - wanted)), host)


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


def host_room() -> float:
    """Return the bytes of memory that this machine's ranks may fill, within the limits of their
    control groups."""
    memory = psutil.virtual_memory()
    limits = list(_limits())
    total = min([memory.total, *(limit for limit, _ in limits)])
    free = min([memory.available, *(left for _, left in limits)])
    return max(0.0, free - KEPT_FREE * total)


def _limits() -> Iterator[tuple[int, int]]:
    """Yield for this process's control groups, and those around them, the limit and what is left.

    Under SLURM the limit is the job's, some levels above the process. In a container the path may
    be that of the machine, most of which cannot be seen inside: what is not there has no say.
    """
    try:
        lines = _OWN_CGROUP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        own = Path(path.lstrip("/"))
        for controller in _CGROUP_FILES.keys() & set(controllers.split(",")):
            folder, *names = _CGROUP_FILES[controller]
            for level in (own, *own.parents):
                with contextlib.suppress(OSError, ValueError):  # not a number: no limit
                    yield _limit(_CGROUP / folder / level, *names)


def _limit(group: Path, limit_name: str, use_name: str, cache_name: str) -> tuple[int, int]:
    limit, used = (int((group / name).read_text()) for name in (limit_name, use_name))
    statistics = (group / "memory.stat").read_text().split()
    return limit, limit - used + int(statistics[statistics.index(cache_name) + 1])


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
