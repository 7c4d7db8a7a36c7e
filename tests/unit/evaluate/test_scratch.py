"""Candidates on disk: where they go, what is in them, and that they go away."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_mergemix.errors import EvaluationError
from megatron_mergemix.evaluate import scratch as module
from megatron_mergemix.evaluate.proxy import MergedFrom
from megatron_mergemix.evaluate.scratch import Scratch
from tests.support.checkpoint_family import write_family
from tests.support.weights import assert_same_weights, read_weights


@pytest.fixture
def merged(tmp_path: Path) -> MergedFrom:
    folders, _ = write_family(tmp_path / "family")
    base = folders.pop("base")
    weights = {"a": 1.5, "b": -0.5}
    return MergedFrom(base, {name: (path, weights[name]) for name, path in folders.items()})


def scratch(tmp_path: Path) -> Scratch:
    (tmp_path / "memory").mkdir(exist_ok=True)
    return Scratch(tmp_path / "run", tmp_path / "disk", tmp_path / "memory")


def test_a_candidate_is_the_weighted_sum_and_is_gone_afterwards(
    tmp_path: Path, merged: MergedFrom
) -> None:
    place = scratch(tmp_path)
    with place.holding(merged) as folder:
        found = read_weights(folder / "candidate" / "release")
    assert list((tmp_path / "memory").iterdir()) == []
    parts = {name: read_weights(path) for name, (path, _) in merged.experts.items()}
    for name, weight in found.items():
        exact = 1.5 * parts["a"][name] - 0.5 * parts["b"][name]
        rounded = torch.tensor(exact, dtype=torch.float32).bfloat16().double().numpy()
        np.testing.assert_array_equal(weight, rounded, err_msg=name)


def test_without_weights_it_is_the_base(tmp_path: Path, merged: MergedFrom) -> None:
    none = {name: (path, 0.0) for name, (path, _) in merged.experts.items()}
    for experts in ({}, none):
        with scratch(tmp_path).holding(MergedFrom(merged.base, experts)) as folder:
            assert_same_weights(folder / "candidate" / "release", merged.base)


def test_it_lies_in_memory_or_on_disk_and_that_is_said_once(
    tmp_path: Path, merged: MergedFrom, monkeypatch, capsys
) -> None:
    place = scratch(tmp_path)
    for _ in range(2):
        with place.holding(merged) as folder:
            assert folder.parent == tmp_path / "memory"
    assert capsys.readouterr().out.count("is written to") == 1
    monkeypatch.setattr(module, "_room_in", lambda memory: 1000.0)
    with place.holding(merged) as folder:
        assert folder.parent == tmp_path / "disk"
    assert f"is written to {tmp_path / 'disk'}" in capsys.readouterr().out
    assert not (tmp_path / "disk").exists()


def test_a_disk_without_room_is_one_error_before_anything_is_written(
    tmp_path: Path, merged: MergedFrom, monkeypatch
) -> None:
    place = scratch(tmp_path)
    monkeypatch.setattr(module, "_room_in", lambda memory: 0.0)
    monkeypatch.setattr(module, "_free_on", lambda folder: 2**20)
    with (
        pytest.raises(EvaluationError, match=r"takes 0\.06 GiB, .*disk has 0\.00 GiB free\. Set"),
        place.holding(merged),
    ):
        pass
    assert not (tmp_path / "disk").exists()


def test_the_room_of_a_folder_that_is_not_there_yet_is_that_of_its_disk(tmp_path: Path) -> None:
    assert module._free_on(tmp_path / "a" / "b") > 2**20


def test_what_lives_is_not_tidied_away(tmp_path: Path, merged: MergedFrom) -> None:
    with scratch(tmp_path).holding(merged) as folder:
        scratch(tmp_path)
        assert (folder / "candidate").is_dir()


def test_a_candidate_that_cannot_be_written_fails_alone(tmp_path: Path, merged: MergedFrom) -> None:
    place = scratch(tmp_path)
    gone = MergedFrom(merged.base, {"a": (tmp_path / "gone", 1.0)})
    with (
        pytest.raises(EvaluationError, match="the candidate cannot be written to disk: .*gone"),
        place.holding(gone),
    ):
        pass
    assert list((tmp_path / "memory").iterdir()) == []
    with place.holding(merged):
        pass


def test_in_memory_no_more_is_filled_than_this_machine_s_ranks_may(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(module, "host_room", lambda: 5.0)
    assert module._room_in(tmp_path) == 5.0


def test_memory_that_is_not_there_has_no_room(tmp_path: Path) -> None:
    assert module._room_in(tmp_path / "nowhere") == 0.0


@pytest.fixture
def nfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what is removed while this process has it open under another name, as NFS does."""
    unlink, close = os.unlink, os.close
    kept: dict[int, str] = {}

    def open_as(path: str) -> list[int]:
        found = []
        for number in map(int, os.listdir("/proc/self/fd")):
            try:
                found += [number] if os.readlink(f"/proc/self/fd/{number}") == path else []
            except OSError:  # it was that of the listing
                continue
        return found

    def unlink_on_nfs(name: Any, *, dir_fd: int | None = None) -> None:
        folder = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        path = os.path.join(folder, name)
        if numbers := open_as(path):
            kept[numbers[0]] = os.path.join(os.path.dirname(path), f".nfs{numbers[0]}")
            os.rename(path, kept[numbers[0]])
        elif path in kept.values():
            raise OSError(errno.EBUSY, "busy")
        else:
            unlink(name, dir_fd=dir_fd)

    def close_on_nfs(number: int) -> None:
        close(number)
        if number in kept:
            unlink(kept.pop(number))

    monkeypatch.setattr(os, "unlink", unlink_on_nfs)
    monkeypatch.setattr(os, "close", close_on_nfs)


def test_on_nfs_nothing_is_left_for_the_next_candidate(
    tmp_path: Path, merged: MergedFrom, monkeypatch: pytest.MonkeyPatch, nfs: None
) -> None:
    monkeypatch.setattr(module, "_room_in", lambda memory: 0.0)
    place = scratch(tmp_path)
    for _ in range(2):
        with place.holding(merged) as folder:
            assert (folder / "candidate").is_dir()
        assert not (tmp_path / "disk").exists()


def test_on_nfs_what_a_killed_process_left_goes(tmp_path: Path, nfs: None) -> None:
    place = scratch(tmp_path)
    left = tmp_path / "disk" / f"{place._prefix}elsewhere.1.0"
    (left / "candidate").mkdir(parents=True)
    (left / "lock").touch()
    scratch(tmp_path)
    assert not left.exists()


def test_a_file_that_a_command_keeps_open_does_not_stop_the_next_candidate(
    tmp_path: Path, merged: MergedFrom, nfs: None
) -> None:
    place = scratch(tmp_path)
    with place.holding(merged) as first:
        kept = os.open(first / "output", os.O_RDWR | os.O_CREAT)
    assert first.exists()
    with place.holding(merged) as second:
        assert second != first
    os.close(kept)


def test_a_file_system_without_locks_fails_the_candidate(
    tmp_path: Path, merged: MergedFrom, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    place = scratch(tmp_path)
    monkeypatch.setattr(module.fcntl, "flock", refuse)
    with (
        pytest.raises(EvaluationError, match="cannot be written to disk: .*No locks available"),
        place.holding(merged),
    ):
        pass
    assert list((tmp_path / "memory").iterdir()) == []
