"""What the scores of a command depend on, as far as its words tell. No torch."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from megatron_mergemix.config.evaluate import CommandTask


def command_digest(task: CommandTask) -> dict[str, str]:
    """Return name -> text: an empty name for words and metrics, ``.file.NAME`` for each file.

    Files are the program itself and whatever else the words name that is a file, by their
    contents, so a resumed search says which script was changed. What a program reads besides, and
    folders, are not seen.
    """
    direction = "higher" if task.higher_is_better else "lower"
    error = "" if task.stderr is None else f", stderr {task.stderr}"
    words = json.dumps(task.run)
    if len(words) > 200:
        words = hashlib.sha256(words.encode()).hexdigest()
    text = f"command {words}, {', '.join(task.metrics)}{error}, {direction} is better"
    return {"": text, **{f".file.{word}": _content(path) for word, path in _files(task)}}


def _files(task: CommandTask) -> Iterator[tuple[str, Path]]:
    program = shutil.which(task.run[0]) if task.run else None
    if program is not None:
        yield task.run[0], Path(program)
    for word in task.run[1:]:
        for text in dict.fromkeys((word, word.partition("=")[2])):  # also --script=eval.py
            if text and os.path.isfile(text):
                yield text, Path(text)


def _content(path: Path) -> str:
    status = path.stat()
    return _hashed(str(path.resolve()), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _hashed(path: str, size: int, time: int) -> str:
    """Return the beginning of the SHA-256 of a file; size and time tell whether it is the same."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]
