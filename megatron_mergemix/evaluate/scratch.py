"""Candidates as checkpoints on disk, for as long as a command needs them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from megatron_mergemix.errors import CheckpointError, EvaluationError, MergeMixError
from megatron_mergemix.evaluate.proxy import MergedFrom
from megatron_mergemix.merge.checkpoints import Settings, merge_checkpoints
from megatron_mergemix.merge.inputs import opened
from megatron_mergemix.merge.methods import Recipe
from megatron_mergemix.merge.placement import host_room

MEMORY = Path("/dev/shm")

_HEADROOM = 64 * 2**20
"""Bytes for what is in a checkpoint beside the weights, and what the command writes."""


class Scratch:
    """A folder of one process, in memory where a candidate fits there, with one candidate in it.

    The folder is locked for as long as its process lives and is gone when it ends; what a killed
    process of the same experiment left, on this machine or on a shared disk, goes when the next
    one begins.
    """

    def __init__(self, run_dir: Path, on_disk: Path, memory: Path = MEMORY) -> None:
        """Remove what killed processes left; nothing is made yet.

        Args:
            run_dir: of the experiment; its own scratch is told from that of others by it.
            on_disk: folder for candidates that do not fit into memory.
            memory: folder in memory.
        """
        self._places = [memory, on_disk]
        digest = hashlib.sha256(os.path.realpath(run_dir).encode()).hexdigest()[:12]
        self._prefix = f"mergemix-{digest}."
        self._numbers = itertools.count()
        self._told: Path | None = None
        self._verified: set[Path] = set()
        for place in self._places:
            self._tidy(place)

    @contextlib.contextmanager
    def holding(self, merged: MergedFrom) -> Iterator[Path]:
        """Write a candidate as ``candidate`` into a folder; give it, and remove it afterwards.

        Raises:
            EvaluationError: the candidate cannot be written; says why.
        """
        try:
            place = self._place(_num_bytes(merged))
            # A name of its own: whatever a command left running may still keep the one before.
            name = f"{socket.gethostname()}.{os.getpid()}.{next(self._numbers)}"
            folder = place / f"{self._prefix}{name}"
            lock = _made(folder)
        except (OSError, MergeMixError) as error:
            raise EvaluationError(f"the candidate cannot be written to disk: {error}") from error
        try:
            self._write(merged, folder / "candidate")
            yield folder
        finally:
            _remove(folder, lock)
            with contextlib.suppress(OSError):
                if place != self._places[0]:
                    place.rmdir()  # only if nobody else has anything in it

    def _write(self, merged: MergedFrom, target: Path) -> None:
        paths = {merged.base, *(path for path, _ in merged.experts.values())}
        # Reading twice what did not change since the search began finds nothing new.
        settings = replace(Settings(), verify=not paths <= self._verified, allow_non_finite=True)
        try:
            merge_checkpoints(
                merged.base, merged.experts, Recipe("task_arithmetic", ()), target, settings, {}
            )
        except (CheckpointError, OSError) as error:  # a full disk, too
            raise EvaluationError(f"the candidate cannot be written to disk: {error}") from error
        self._verified |= paths

    def _place(self, needed: int) -> Path:
        """Return where a candidate of that many bytes goes, and say so when that is new.

        Raises:
            EvaluationError: the disk has no room for it, either.
        """
        memory, on_disk = self._places
        room = _room_in(memory)
        place = memory if needed <= room else on_disk
        if place == on_disk and needed > (free := _free_on(on_disk)):
            raise EvaluationError(
                f"it takes {needed / 2**30:.2f} GiB, and {on_disk} has {free / 2**30:.2f} GiB "
                "free. Set evaluate.scratch to a folder on a disk with more room."
            )
        if place != self._told:
            self._told = place
            print(
                f"commands: a candidate takes {needed / 2**30:.2f} GiB and is written to {place} "
                f"({max(0.0, room) / 2**30:.2f} GiB may be filled in memory)",
                flush=True,
            )
        return place

    def _tidy(self, place: Path) -> None:
        for folder in place.glob(f"{self._prefix}*"):
            with contextlib.suppress(OSError):  # its owner lives
                _remove(folder, _locked(folder))


def _made(folder: Path) -> int:
    """Make a folder; return its lock, open and held.

    Raises:
        OSError: it cannot be made or locked; nothing is left of it.
    """
    folder.mkdir(parents=True)
    try:
        return _locked(folder)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _locked(folder: Path) -> int:
    """Return the lock of a folder, open and held.

    Raises:
        OSError: another process holds it, or the file system has no locks.
    """
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock


def _remove(folder: Path, lock: int) -> None:
    """Remove a folder and let go of its lock."""
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)
    # NFS only renames a file that is open here, and the folder stays for as long.
    shutil.rmtree(folder, ignore_errors=True)


def _num_bytes(merged: MergedFrom) -> int:
    tensors = opened(merged.base).model_tensors().values()
    return sum(tensor.num_bytes for tensor in tensors) + _HEADROOM


def _free_on(folder: Path) -> int:
    """Return the free bytes of the disk on which a folder is, or would be made."""
    at = folder.absolute()
    while not at.exists():
        at = at.parent
    return shutil.disk_usage(at).free


def _room_in(memory: Path) -> float:
    """Return the bytes that may be filled in a folder in memory; 0 where there is none."""
    if not os.access(memory, os.W_OK | os.X_OK):
        return 0.0
    return min(float(shutil.disk_usage(memory).free), host_room())
