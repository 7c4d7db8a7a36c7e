"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_mergemix.errors import MergeMixError


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
            raise refused(path, error) from error
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


def refused(path: Path, error: OSError) -> MergeMixError:
    """Return the error that says why a file cannot be written."""
    return MergeMixError(f"cannot write {path}: {error.strerror}. {path.parent} must be writable.")
