"""Copies go to the fastest place with room, and whoever wishes another one is told what fits."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from megatron_mergemix.errors import MergeMixError
from megatron_mergemix.merge import placement
from megatron_mergemix.merge.placement import Room, choose_place, describe, room_on

CPU, GPU = torch.device("cpu"), torch.device("cuda")
GIB = 2**30


@pytest.mark.parametrize(
    ("device", "needed", "expected"),
    [
        (GPU, 5, "device"),
        (GPU, 10, "device"),
        (GPU, 11, "host"),
        (GPU, 21, "file"),
        (CPU, 10, "device"),
        (CPU, 11, "file"),
    ],
)
def test_auto_takes_the_first_place_with_room(device, needed: int, expected: str) -> None:
    room = Room(10, 20) if device == GPU else Room(10, 10)
    assert choose_place("auto", needed, room, device.type) == expected


def test_a_wish_is_followed_where_it_fits() -> None:
    assert choose_place("host", 5, Room(10, 20), GPU.type) == "host"
    assert choose_place("file", 500, Room(10, 20), GPU.type) == "file"


def test_a_wish_that_does_not_fit_is_refused_with_both_sizes() -> None:
    with pytest.raises(MergeMixError, match=r"resident is device.*12\.00 GiB.*10\.00 GiB"):
        choose_place("device", 12 * GIB, Room(10 * GIB, 20 * GIB), GPU.type)
    with pytest.raises(MergeMixError, match=r"resident is host.*25\.00 GiB.*20\.00 GiB"):
        choose_place("host", 25 * GIB, Room(10 * GIB, 20 * GIB), GPU.type)


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the root of control groups of a machine of 1000 GiB, 900 of them free."""
    memory = psutil.virtual_memory()._replace(total=1000 * GIB, available=900 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(placement, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(placement, "_OWN_CGROUP", tmp_path / "own")
    return tmp_path / "cgroup"


def limit(group: Path, limit: int | str, used: int, cached: int) -> None:
    """Write the files of a control group, version 2; sizes in GiB."""
    group.mkdir(parents=True, exist_ok=True)
    size = limit if isinstance(limit, str) else str(limit * GIB)
    (group / "memory.max").write_text(f"{size}\n")
    (group / "memory.current").write_text(f"{used * GIB}\n")
    (group / "memory.stat").write_text(f"anon {used * GIB}\ninactive_file {cached * GIB}\n")


def test_ranks_of_one_machine_share_its_memory(groups: Path) -> None:
    assert room_on(CPU, 1) == Room(750 * GIB, 750 * GIB)
    assert room_on(CPU, 4) == Room(750 * GIB // 4, 750 * GIB // 4)


def test_in_a_container_a_share_of_its_own_limit_stays_free(groups: Path) -> None:
    """A share of the machine would be more than the container has."""
    (groups.parent / "own").write_text("0::/\n")
    limit(groups, 100, used=8, cached=3)
    assert room_on(CPU, 1).host == (100 - 8 + 3 - 15) * GIB
    assert room_on(CPU, 5).host == (100 - 8 + 3 - 15) * GIB // 5
    limit(groups, 100, used=99, cached=0)
    assert room_on(CPU, 1).host == 0
    limit(groups, "max", used=8, cached=3)
    assert room_on(CPU, 1).host == 750 * GIB


def test_the_limit_of_a_job_counts_some_levels_above_the_process(groups: Path) -> None:
    """As SLURM does it, without a namespace of control groups."""
    job = "system.slice/slurmstepd.scope/job_7"
    (groups.parent / "own").write_text(f"0::/{job}/step_0/user/task_0\n")
    limit(groups / job / "step_0/user/task_0", "max", used=1, cached=0)
    limit(groups / job, 200, used=20, cached=10)
    assert room_on(CPU, 1).host == (200 - 20 + 10 - 30) * GIB
    limit(groups / job / "step_0", 100, used=1, cached=0)
    assert room_on(CPU, 1).host == (100 - 1 - 15) * GIB
    limit(groups / job, 200, used=190, cached=10)  # by others of the same job
    assert room_on(CPU, 1).host == (200 - 190 + 10 - 15) * GIB


@pytest.mark.parametrize("place", ["slurm/uid_1/job_7", "."], ids=["machine", "container"])
def test_limits_of_the_first_version_count_too(groups: Path, place: str) -> None:
    """In a container the path is often that of the machine, and its own group lies at the root."""
    lines = "4:cpu,memory:/slurm/uid_1/job_7/step_0\n3:cpuset:/\n1:name=systemd:/a:b\n0::/\n"
    (groups.parent / "own").write_text(lines)
    for group, size in ((place, 100 * GIB), (".", 2**63 - 4096)):
        folder = groups / "memory" / group
        if not folder.exists():
            folder.mkdir(parents=True)
            (folder / "memory.limit_in_bytes").write_text(f"{size}\n")
            (folder / "memory.usage_in_bytes").write_text(f"{8 * GIB}\n")
            cached = f"inactive_file 0\ntotal_inactive_file {3 * GIB}\n"
            (folder / "memory.stat").write_text(cached)
    assert room_on(CPU, 1).host == (100 - 8 + 3 - 15) * GIB


def test_what_torch_has_cached_on_a_device_is_room(
    groups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [40 * GIB]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.append(90 * GIB))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[-1], 100 * GIB))
    assert room_on(GPU, 2) == Room(75 * GIB, 375 * GIB)


def test_people_read_what_is_held_where_and_what_was_free() -> None:
    room = Room(3 * GIB, 9 * GIB)
    assert describe("host", 4 * GIB, room, GPU, Path("/tmp")) == (
        "4.00 GiB on the fullest rank, held in pinned host memory "
        "(3.00 GiB free for them on the device, 9.00 GiB on the host)"
    )
    assert "held in a file in /nvme, mapped" in describe("file", 4, room, CPU, Path("/nvme"))
