"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from megatron_mergemix.errors import CheckpointError
from megatron_mergemix.run_dir import sync_folder

PROVENANCE = "mergemix.json"
"""File in the root of a checkpoint that we wrote; only such a root is ever overwritten."""


def check_target(target: Path, overwrite: bool) -> None:
    """Check that ``target`` may be written, and remove what killed runs of this host left there.

    Raises:
        CheckpointError: ``target`` exists, and is not ours or ``overwrite`` is off.
    """
    if foreign := remove_leftovers(target):
        logging.getLogger(__name__).warning(
            "%s: left by a merge on another machine that was killed, or is under way. Remove it "
            "when it is not.",
            ", ".join(map(str, foreign)),
        )
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
    removes it. A ``target`` that exists (see :func:`check_target`) is replaced: it moves out of
    the way just before, so a kill between the two steps leaves nothing under its name.

    Args:
        target: the folder to appear.
        num_bytes: what will be written, so that a full disk is refused beforehand.

    Raises:
        CheckpointError: too little space, or the file system refuses; says why.
    """
    building = _hidden(target, "building")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < num_bytes:
            raise CheckpointError(
                f"{target.parent} has {free / 1e9:.3f} GB left, {num_bytes / 1e9:.3f} GB are "
                "needed. Free some space or write somewhere else."
            )
        building.mkdir()
        yield building
        sync_folder(building)
        if os.path.lexists(target):
            replaced = _hidden(target, "replaced")
            os.rename(target, replaced)
            os.rename(building, target)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.rename(building, target)
        sync_folder(target.parent)
    except BaseException as error:
        shutil.rmtree(building, ignore_errors=True)
        if isinstance(error, OSError):
            where = error.filename or target
            raise CheckpointError(
                f"cannot write {target}: {error.strerror} ({where}). Nothing was published."
            ) from error
        raise


def remove_leftovers(target: Path) -> list[Path]:
    """Remove hidden folders of dead processes of this host; return those of other hosts."""
    foreign = []
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(building|replaced)\.(.+)\.(\d+)")
    for path in target.parent.glob(f".{target.name}.*") if target.parent.is_dir() else ():
        match = pattern.fullmatch(path.name)
        if match is None:
            continue
        if match[2] != socket.gethostname():
            foreign.append(path)
        elif not Path(f"/proc/{match[3]}").exists():
            shutil.rmtree(path, ignore_errors=True)
    return foreign


def _hidden(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.{what}.{socket.gethostname()}.{os.getpid()}")
