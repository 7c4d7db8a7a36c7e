"""The append-only file that keeps the trials of a search.

It is JSON lines. The first line is the header: digests of everything the trials were measured on,
and of the strategy that asks for them. Every other line is one trial. A line carries its checksum,
is written with one ``write`` and fsynced, so a killed search loses at most what is under way: one
trial, or, where replicas score candidates of their own, one for each of them. The only damage a
crash can do is a torn last line, which is dropped on reading. Anything else that cannot be read is
an error.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_mergemix.errors import SearchError
from megatron_mergemix.files.publishing import sync_folder
from megatron_mergemix.trials import Trial, trial_of_record

_log = logging.getLogger(__name__)

FORMAT_VERSION = 1


class Journal:
    """The trials of one search, in memory and in a file that only grows.

    One process writes. A second writer is noticed before it can do harm: an append is refused
    when the file is not as long as this journal left it.
    """

    def __init__(self, path: Path, digests: Mapping[str, str]) -> None:
        """Open the file, or create it with a header.

        Args:
            path: the file; its folder is made if missing.
            digests: what the trials depend on, by name.

        Raises:
            SearchError: the file is damaged, or its trials were measured on something else.
        """
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SearchError(f"cannot make {path.parent}: {error.strerror}") from error
        content = _read(path) if path.exists() else _Content()
        self._trials = content.trials
        self._good, self._size = content.good_bytes, content.total_bytes
        if content.digests is not None:
            _check_digests(path, content.digests, digests)
            return
        header = {"version": FORMAT_VERSION, "digests": dict(digests)}
        self._append_line(_encode("header", header), os.O_CREAT)
        sync_folder(path.parent)

    def trials(self) -> list[Trial]:
        """Return all trials in the order of writing."""
        return list(self._trials)

    def append(self, trial: Trial) -> None:
        """Add one trial; when this returns it is on the disk.

        Raises:
            SearchError: the index is taken, a number is not finite, the disk is full, or another
                process wrote to the file.
        """
        if any(known.index == trial.index for known in self._trials):
            raise SearchError(
                f"{self._path} already has a trial {trial.index}. Start the search again: it goes "
                "on from what is there."
            )
        try:
            line = _encode("trial", asdict(trial))
        except (TypeError, ValueError) as error:
            raise SearchError(
                f"trial {trial.index} cannot be recorded: {error}. Every number must be a finite "
                "Python float; a candidate that scored none is a trial with an error."
            ) from error
        self._append_line(line)
        self._trials.append(trial)

    def _append_line(self, line: bytes, create: int = 0) -> None:
        try:
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | create, 0o644)
        except OSError as error:
            raise SearchError(f"cannot write {self._path}: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = os.fstat(file).st_size
            if size != self._size:
                raise SearchError(
                    f"{self._path} has {size} bytes, expected {self._size}: another process "
                    "writes to it. Only one search may run in a run_dir."
                )
            if size != self._good:
                _log.warning(
                    "%s ends in a torn line of %d bytes; dropped", self._path, size - self._good
                )
                os.ftruncate(file, self._good)
            _write_whole(file, line, self._good, self._path)
        finally:
            os.close(file)
        self._good = self._size = self._good + len(line)


def read_journal(path: Path) -> tuple[dict[str, str], list[Trial]]:
    """Return the digests and trials of a journal without changing it, also while it is written.

    Raises:
        SearchError: there is no journal, or it is damaged.
    """
    if not path.exists():
        raise SearchError(f"there is no journal {path}; run the search first")
    content = _read(path)
    return content.digests or {}, content.trials


@dataclass
class _Content:
    """What a file holds; ``digests`` is None where not even the header is complete."""

    digests: dict[str, str] | None = None
    trials: list[Trial] = field(default_factory=list)
    good_bytes: int = 0
    total_bytes: int = 0


def _read(path: Path) -> _Content:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise SearchError(f"cannot read {path}: {error.strerror}") from error
    *lines, torn = raw.split(b"\n")
    if not lines and not (torn.startswith(_START) or _START.startswith(torn)):
        raise SearchError(
            f"{path} is not a journal of a search. Move it away: the search then begins anew."
        )
    content = _Content(good_bytes=len(raw) - len(torn), total_bytes=len(raw))
    if not lines:
        return content
    header = _decode("header", lines[0], path, 1)
    if header.get("version") != FORMAT_VERSION:
        raise SearchError(
            f"{path} has format version {header.get('version')}, expected {FORMAT_VERSION}: "
            "it was written by another version of megatron-mergemix. Go on with that version, or "
            "move the file away: the search then begins anew."
        )
    content.digests = header["digests"]
    seen: dict[int, int] = {}
    for number, line in enumerate(lines[1:], 2):
        trial = _trial(_decode("trial", line, path, number), path, number)
        if trial.index in seen:
            raise SearchError(
                f"{path}, lines {seen[trial.index]} and {number}: both hold trial {trial.index}"
            )
        seen[trial.index] = number
        content.trials.append(trial)
    return content


_START = b'{"crc32": "'
_PAYLOAD_AT = len(_START) + 8


def _encode(kind: str, value: Mapping[str, Any]) -> bytes:
    """Return ``{"crc32": "<8 hex digits of the payload>", "<kind>": <payload>}`` and a newline."""
    payload = json.dumps(value, allow_nan=False).encode()
    return _START + b'%08x", "%s": ' % (zlib.crc32(payload), kind.encode()) + payload + b"}\n"


def _decode(kind: str, line: bytes, path: Path, number: int) -> dict[str, Any]:
    key = b'", "%s": ' % kind.encode()
    payload = line[_PAYLOAD_AT + len(key) : -1]
    expected = _START + b"%08x" % zlib.crc32(payload) + key + payload + b"}"
    if line != expected:
        raise SearchError(
            f"{path}, line {number} is damaged: its checksum does not fit. Nothing was changed. "
            "Restore the file from a backup, or move it away to search anew."
        )
    value: dict[str, Any] = json.loads(payload)
    return value


def _trial(record: Mapping[str, Any], path: Path, number: int) -> Trial:
    try:
        return trial_of_record(record)
    except (TypeError, KeyError) as error:
        raise SearchError(
            f"{path}, line {number} has other fields than this version of megatron-mergemix "
            f"writes ({error}). Go on with the version that began the search."
        ) from error


def _write_whole(file: int, line: bytes, start: int, path: Path) -> None:
    """Write and fsync one line that begins at byte ``start``, or leave the file as it was."""
    try:
        written = os.write(file, line)
        os.fsync(file)
    except OSError as error:
        os.ftruncate(file, start)
        raise SearchError(f"cannot write {path}: {error.strerror}") from error
    if written != len(line):
        os.ftruncate(file, start)
        raise SearchError(f"cannot write {path}: only {written} of {len(line)} bytes fitted")


def changed_digests(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Return ``name: old -> new`` of every digest that is another one."""
    return [
        f"{name}: {old.get(name, '(absent)')} -> {new.get(name, '(absent)')}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]


def _check_digests(path: Path, old: Mapping[str, str], new: Mapping[str, str]) -> None:
    if changed := changed_digests(old, new):
        raise SearchError(
            f"the trials in {path} belong to something else: {'; '.join(changed)}. They cannot be "
            "mixed with new ones. Undo the change to go on, or use another run_dir (or move the "
            "file away) to search anew."
        )
