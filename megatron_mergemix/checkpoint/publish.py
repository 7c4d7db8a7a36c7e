"""A folder that appears whole or not at all, and takes the place of an older one in one step."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from megatron_mergemix.errors import CheckpointError
from megatron_mergemix.files.publishing import sync_folder

PROVENANCE = "mergemix.json"
"""File in the root of a checkpoint that we wrote; only such a root is ever overwritten."""

_CWD = -100  # AT_FDCWD
_EXCHANGE = 2  # RENAME_EXCHANGE
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF, errno.EINVAL)

_log = logging.getLogger(__name__)


def check_target(target: Path, overwrite: bool) -> None:
    """Check that ``target`` may be written, and tidy up what killed runs left beside it.

    Raises:
        CheckpointError: ``target`` exists, and is not ours or ``overwrite`` is off; or another
            process is writing it.
    """
    if target.parent.is_dir():
        with _refusals(target), _claimed(target) as alone:
            tidy(target, alone)
    if not os.path.lexists(target):
        return
    if not overwrite:
        hint = " or pass --overwrite" if (target / PROVENANCE).is_file() else ""
        raise CheckpointError(f"{target} exists already. Name another folder{hint}.")
    if not (target / PROVENANCE).is_file():
        raise CheckpointError(
            f"{target} has no {PROVENANCE}, so mergemix did not write it and does not overwrite "
            "it. Name another folder, or remove it yourself."
        )


@contextlib.contextmanager
def publishing_folder(target: Path, num_bytes: int) -> Iterator[Path]:
    """Give a hidden folder beside ``target``; on success it becomes ``target`` in one step.

    On an exception it is removed. A killed process leaves it; the next run to the same target
    removes it. A ``target`` that exists (see :func:`check_target`) is exchanged for the new one,
    so that there is a whole one at any moment. Where the file system cannot exchange, which is
    logged, the old one moves aside for a moment; if that moment is the last one of the process,
    the next run puts it back.

    Args:
        target: the folder to appear.
        num_bytes: what will be written, so that a full disk is refused beforehand.

    Raises:
        CheckpointError: another process is writing ``target``, too little space, or the file
            system refuses; says why.
    """
    building = _hidden(target, "building")
    with _refusals(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _claimed(target) as alone:
            tidy(target, alone)
            free = shutil.disk_usage(target.parent).free
            if free < num_bytes:
                raise CheckpointError(
                    f"{target.parent} has {free / 1e9:.3f} GB left, {num_bytes / 1e9:.3f} GB are "
                    "needed. Free some space or write somewhere else."
                )
            building.mkdir()
            try:
                yield building
                sync_folder(building)
                _publish(building, target)
            finally:
                shutil.rmtree(building, ignore_errors=True)  # ours, or what it was exchanged for


def tidy(target: Path, alone: bool) -> None:
    """Put back, remove or name what killed runs left beside ``target``.

    Args:
        target: the folder that they were to write.
        alone: no other process of this machine writes it. Only then is anything touched, and
            only what was left on this machine; the rest is named in a warning.
    """
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(building|replaced)\.(.+)\.\d+")
    named = []
    for path in sorted(target.parent.glob(f".{target.name}.*")):
        match = pattern.fullmatch(path.name)
        if match is None:
            continue
        is_old = match[1] == "replaced"
        if not alone or match[2] != socket.gethostname():
            named.append(path)
        elif is_old and not os.path.lexists(target):
            os.rename(path, target)
            sync_folder(target.parent)
            _log.warning("%s: put back what a killed run had moved to %s.", target, path.name)
        elif is_old and not (target / PROVENANCE).is_file():
            named.append(path)
        else:
            shutil.rmtree(path, ignore_errors=True)
    if named:
        _log.warning(
            "%s: left by a merge that was killed, perhaps on another machine, or is under way. "
            "When it is not, remove what is called building; what is called replaced is the "
            "checkpoint that was there before.",
            ", ".join(map(str, named)),
        )


def _publish(building: Path, target: Path) -> None:
    """Make ``building`` the ``target``; an older target is removed, or is now ``building``."""
    if not os.path.lexists(target):
        os.rename(building, target)
    elif not _exchange(building, target):
        _log.warning(
            "%s: this file system cannot exchange folders; the old checkpoint moves aside.", target
        )
        replaced = _hidden(target, "replaced")
        os.rename(target, replaced)
        try:
            os.rename(building, target)
        except BaseException:
            os.rename(replaced, target)
            raise
        sync_folder(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    sync_folder(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; False where the file system or the C library cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_CWD, os.fsencode(one), _CWD, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))


@contextlib.contextmanager
def _claimed(target: Path) -> Iterator[bool]:
    """Keep other processes away from ``target``; give False where the file system has no locks.

    The kernel holds the lock, so it ends with the process. It is valid between containers of one
    machine and, on most shared file systems, between machines.

    Raises:
        CheckpointError: another process has it.
    """
    path = target.with_name(f".{target.name}.lock")
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        alone = _lock(file, target)
        while not _is_at(file, path):  # who had it before removed the file: a lock on nothing
            os.close(file)
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            alone = _lock(file, target)
        try:
            yield alone
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(file)


def _lock(file: int, target: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(
            f"{target} is being written by another process. Wait for it or end it, or name "
            "another folder."
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _log.warning("%s has no locks: do not write %s from two processes.", target.parent, target)
        return False
    return True


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.stat(path).st_ino == os.fstat(file).st_ino
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _refusals(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = error.filename or target
        raise CheckpointError(f"cannot write {target}: {error.strerror} ({where}).") from error


def _hidden(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.{what}.{socket.gethostname()}.{os.getpid()}")
