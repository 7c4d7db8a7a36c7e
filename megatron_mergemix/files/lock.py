"""The lock of a stage, which is free the moment its owner is gone."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from megatron_mergemix.errors import MergeMixError
from megatron_mergemix.files.publishing import refused


def _flock(file: int) -> None:
    """Take the lock; a moment is waited, because who merely asks for the holder has it that long.

    Raises:
        BlockingIOError: another process has it, and keeps it.
    """
    for _ in range(5):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.02)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


_held: set[int] = set()
"""Files of the locks that this process has."""


def _let_go() -> None:
    """Close them in a process that was forked, which would hold them beyond the end of this one."""
    for file in _held:
        os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


class Lock:
    """Keeps a second process out for as long as the first one lives.

    The kernel holds the lock (``flock``), so it is gone the moment its owner is, even by
    ``kill -9``; the file stays. Programs that are started while it is held do not inherit it,
    and processes that are forked meanwhile do not keep it.
    """

    def __init__(self, path: Path, what: str) -> None:
        """Prepare, without touching the file.

        Args:
            path: the lock file.
            what: what is locked, for the message to the second process.
        """
        self._path = path
        self._what = what
        self._file: int | None = None

    def __enter__(self) -> Lock:
        """Take the lock.

        Raises:
            MergeMixError: another process has it; names the process, its host and its start.
                Or the file system refuses.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise refused(self._path, error) from error
        try:
            _flock(file)
        except BlockingIOError:
            holder = os.read(file, 1000).decode(errors="replace").strip() or "another process"
            os.close(file)
            raise MergeMixError(
                f"{self._what} is under way already: {holder} holds {self._path}. "
                "Wait for it or end it, or use another run_dir."
            ) from None
        except OSError as error:
            os.close(file)
            raise MergeMixError(
                f"cannot lock {self._path}: {error.strerror}. run_dir must be on a file system "
                "with flock"
            ) from error
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        os.ftruncate(file, 0)
        os.pwrite(
            file, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode(), 0
        )
        self._file = file
        _held.add(file)
        return self

    def holder(self) -> str | None:
        """Return which process has the lock, or None; nobody is kept out by asking."""
        try:
            file = os.open(self._path, os.O_RDONLY)
        except OSError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return os.read(file, 1000).decode(errors="replace").strip() or "another process"
        except OSError:
            return None
        finally:
            os.close(file)
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release the lock; the file stays, because removing it would let two owners in."""
        if self._file in _held:  # not in a process that was forked meanwhile
            _held.discard(self._file)
            os.ftruncate(self._file, 0)
            fcntl.flock(self._file, fcntl.LOCK_UN)  # a helper forked by C code may have it open
            os.close(self._file)
        self._file = None
