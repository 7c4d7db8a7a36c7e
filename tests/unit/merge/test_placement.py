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


def test_ranks_of_one_machine_share_its_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(placement, "_CGROUP", tmp_path)
    memory = psutil.virtual_memory()._replace(total=100 * GIB, available=95 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert room_on(CPU, 1) == Room(80 * GIB, 80 * GIB)
    assert room_on(CPU, 4) == Room(20 * GIB, 20 * GIB)


def test_the_limit_of_the_control_group_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    memory = psutil.virtual_memory()._replace(total=100 * GIB, available=95 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(placement, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{32 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{8 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon {6 * GIB}\ninactive_file {1 * GIB}\n")
    assert room_on(CPU, 1) == Room(10 * GIB, 10 * GIB)
    (tmp_path / "memory.max").write_text("max\n")
    assert room_on(CPU, 1) == Room(80 * GIB, 80 * GIB)


def test_people_read_what_is_held_where_and_what_was_free() -> None:
    room = Room(3 * GIB, 9 * GIB)
    assert describe("host", 4 * GIB, room, GPU, Path("/tmp")) == (
        "4.00 GiB on the fullest rank, held in pinned host memory "
        "(3.00 GiB free for them on the device, 9.00 GiB on the host)"
    )
    assert "held in a file in /nvme, mapped" in describe("file", 4, room, CPU, Path("/nvme"))
