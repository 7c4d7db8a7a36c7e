"""Folders that appear whole or not at all, with processes that are really killed in between."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mergemix.checkpoint import publish
from megatron_mergemix.checkpoint.publish import PROVENANCE, check_target, publishing_folder
from megatron_mergemix.errors import CheckpointError
from tests.support.run_distributed import REPOSITORY

KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_mergemix.checkpoint import publish

where, target = sys.argv[1], Path(sys.argv[2])
rename, exchange, remove = os.rename, publish._exchange, publish.shutil.rmtree
renames = []

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def counted(one, other):
    if where == "between the renames" and renames:
        die()
    renames.append(one)
    rename(one, other)
    if where == "after both renames" and len(renames) == 2:
        die()

def exchanged(one, other):
    if where == "before the exchange":
        die()
    done = exchange(one, other) if where == "after the exchange" else False
    if done:
        die()
    return done

os.rename, publish._exchange = counted, exchanged
with publish.publishing_folder(target, 0) as building:
    (building / "mergemix.json").write_text("new")
    if where == "while it is written":
        die()
raise SystemExit("not killed")
"""


def write(target: Path, text: str) -> None:
    check_target(target, overwrite=True)
    with publishing_folder(target, 0) as building:
        (building / PROVENANCE).write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def kill(where: str, target: Path) -> None:
    command = [sys.executable, "-c", KILLED, where, str(target)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True
    )
    assert done.returncode == -9, done.stderr


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("while it is written", "old"),
        ("before the exchange", "old"),
        ("after the exchange", "new"),
        ("between the renames", "old"),  # where folders cannot be exchanged
        ("after both renames", "new"),
    ],
)
def test_a_kill_at_any_point_loses_neither_the_old_nor_the_new(
    tmp_path: Path, where: str, expected: str
) -> None:
    target = tmp_path / "out"
    write(target, "old")
    kill(where, target)
    assert target.exists() == (where != "between the renames")
    with pytest.raises(CheckpointError, match="exists already"):
        check_target(target, overwrite=False)
    assert (target / PROVENANCE).read_text() == expected
    assert names(tmp_path) == ["out"], "the leftovers are gone"
    write(target, "newer")
    assert (target / PROVENANCE).read_text() == "newer"
    assert names(tmp_path) == ["out"]


def test_a_first_write_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    kill("while it is written", tmp_path / "out")
    check_target(tmp_path / "out", overwrite=False)
    assert names(tmp_path) == []


def test_this_file_system_exchanges_folders(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert publish._exchange(tmp_path / "one", tmp_path / "other")
    assert names(tmp_path / "one") == ["other"]
    assert names(tmp_path / "other") == ["one"]
    with pytest.raises(FileNotFoundError):
        publish._exchange(tmp_path / "one", tmp_path / "none")


def test_without_exchange_the_old_one_moves_aside_and_that_is_said(
    tmp_path: Path, monkeypatch, caplog
) -> None:
    write(tmp_path / "out", "old")
    monkeypatch.setattr(publish, "_exchange", lambda one, other: False)
    write(tmp_path / "out", "new")
    assert (tmp_path / "out" / PROVENANCE).read_text() == "new"
    assert names(tmp_path) == ["out"]
    assert "cannot exchange folders" in caplog.text


def test_the_old_one_is_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch
) -> None:
    write(tmp_path / "out", "old")
    monkeypatch.setattr(publish, "_exchange", lambda one, other: False)
    rename = os.rename

    def refuse(one: Path, other: Path) -> None:
        if ".building." in str(one):
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(one, other)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(CheckpointError, match="No space left"):
        write(tmp_path / "out", "new")
    assert (tmp_path / "out" / PROVENANCE).read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_two_processes_do_not_write_one_target(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with publishing_folder(target, 0) as building:
        (building / "x").touch()
        for attempt in (lambda: check_target(target, True), lambda: write(target, "second")):
            with pytest.raises(CheckpointError, match="being written by another process"):
                attempt()
        assert names(building) == ["x"]
    assert names(target) == ["x"]
    assert names(tmp_path) == ["out"]


def test_leftovers_go_even_when_their_process_id_lives_again(tmp_path: Path) -> None:
    own = f"{socket.gethostname()}.{os.getpid()}"
    (tmp_path / f".out.building.{own}").mkdir()
    check_target(tmp_path / "out", overwrite=False)
    assert names(tmp_path) == []


def test_leftovers_of_other_machines_and_other_targets_stay_and_are_named(
    tmp_path: Path, caplog
) -> None:
    kept = [".out.building.elsewhere.1", ".out.replaced.elsewhere.1", ".outer.building.elsewhere.1"]
    for name in kept:
        (tmp_path / name).mkdir()
    check_target(tmp_path / "out", overwrite=False)
    assert names(tmp_path) == kept
    assert all((name in caplog.text) == name.startswith(".out.") for name in kept)


def test_an_old_checkpoint_stays_when_something_else_took_its_name(tmp_path: Path, caplog) -> None:
    aside = tmp_path / f".out.replaced.{socket.gethostname()}.1"
    for folder in (aside, tmp_path / "out"):
        folder.mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        check_target(tmp_path / "out", overwrite=False)
    assert aside.is_dir()
    assert aside.name in caplog.text


def test_without_locks_nothing_is_touched_and_that_is_said(
    tmp_path: Path, monkeypatch, caplog
) -> None:
    def no_locks(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    left = tmp_path / f".out.building.{socket.gethostname()}.1"
    left.mkdir()
    write(tmp_path / "out", "new")
    assert names(tmp_path) == [left.name, "out"]
    assert "has no locks" in caplog.text
    assert left.name in caplog.text
