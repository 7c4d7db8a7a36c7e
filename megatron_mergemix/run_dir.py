"""Every path of an experiment, files that appear whole or not at all, and the lock of a stage."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_mergemix.errors import MergeMixError


@dataclass(frozen=True)
class RunDir:
    """Where an experiment keeps its files; nothing is created before something is written.

    Attributes:
        root: ``run_dir`` of the configuration.
    """

    root: Path

    @property
    def base(self) -> Path:
        """Return the folder of a base that is trained here."""
        return self.root / "base"

    def expert(self, name: str) -> Path:
        """Return the folder of the run that trains one expert."""
        return self.root / "experts" / name

    def reference(self, name: str) -> Path:
        """Return the folder of the run that trains one reference model."""
        return self.root / "references" / name

    @property
    def cache(self) -> Path:
        """Return the folder of Megatron's dataset index files, a folder in it for each run.

        Megatron writes them in place, so runs that may be trained at the same time share none.
        """
        return self.root / "cache"

    @property
    def config(self) -> Path:
        """Return the file with the resolved configuration, every default written out."""
        return self.root / "config.json"

    @property
    def launch(self) -> Path:
        """Return the file with what a Megatron-LM launch says about its model."""
        return self.root / "launch.json"

    @property
    def trials(self) -> Path:
        """Return the journal of the search."""
        return self.root / "search" / "trials.jsonl"

    @property
    def result(self) -> Path:
        """Return the file with what the search recommends."""
        return self.root / "search" / "result.json"

    def expert_tokens(self, name: str) -> Path:
        """Return the file with what an expert says of every held-out token."""
        return self.root / "search" / "ensemble" / f"{name}.npz"

    @property
    def commands(self) -> Path:
        """Return the folder of the output of commands that scored candidates."""
        return self.root / "search" / "commands"

    @property
    def held_out(self) -> Path:
        """Return the file with scores on items that the search never saw."""
        return self.root / "search" / "held_out.json"

    @property
    def evaluate(self) -> Path:
        """Return the folder of what ``mergemix evaluate`` and the stage evaluate measured."""
        return self.root / "evaluate"

    @property
    def scratch(self) -> Path:
        """Return the folder of candidates on disk that do not fit into memory."""
        return self.root / "scratch"

    @property
    def blend(self) -> Path:
        """Return the folder of the files that hand the mixture to Megatron."""
        return self.root / "blend"

    @property
    def validation(self) -> Path:
        """Return the file with what the reference models say about the search."""
        return self.root / "validate" / "result.json"

    @property
    def diagnosis(self) -> Path:
        """Return the file with what ``mergemix diagnose`` says about the experts."""
        return self.root / "diagnose" / "result.json"

    @property
    def diagnosis_measured(self) -> Path:
        """Return the file with the numbers that a diagnosis is computed from."""
        return self.root / "diagnose" / "measured.json"

    @property
    def report(self) -> Path:
        """Return the page that shows the experiment."""
        return self.root / "report.html"

    @property
    def slurm(self) -> Path:
        """Return the folder of the jobs that were submitted to a cluster."""
        return self.root / "slurm"

    def put_on_record(self, settings: Any) -> None:
        """Write the settings for those that read the folder, such as ``mergemix report``.

        While a verb of ``mergemix`` is at work it has written its own, which its stages go by.
        """
        if self.lock("run").holder() is None:
            publish_json(self.config, settings)

    def tensorboard(self, what: str) -> Path:
        """Return the TensorBoard folder of one run: ``"search"``, ``"experts/math"``."""
        return self.root / "tensorboard" / what

    def log(self, what: str) -> Path:
        """Return the log file of one process or job."""
        return self.root / "logs" / f"{what}.log"

    def lock(self, what: str) -> Lock:
        """Return the lock that keeps a second start out: ``"run"``, ``"experts/math"``, ..."""
        return Lock(self.root / f"{what}.lock", f"{what} in {self.root}")


@contextlib.contextmanager
def publishing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on success it becomes ``path`` in one step.

    A reader sees the old file or the whole new one, also after a power failure. On an exception
    the temporary file is removed and ``path`` stays as it was.

    Raises:
        MergeMixError: the file system refuses; says why.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise _refused(path, error) from error
        raise


def publish_text(path: Path, text: str) -> None:
    """Write UTF-8 text so that ``path`` holds all of it or what it held before."""
    with publishing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def publish_json(path: Path, value: Any) -> None:
    """Write JSON, indented, so that ``path`` holds all of it or what it held before.

    Raises:
        ValueError: the value holds NaN or an infinity, which JSON does not know.
    """
    publish_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def sync_folder(path: Path) -> None:
    """Make the names in a folder survive a power failure."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _refused(path: Path, error: OSError) -> MergeMixError:
    return MergeMixError(f"cannot write {path}: {error.strerror}. {path.parent} must be writable.")


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
            raise _refused(self._path, error) from error
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
