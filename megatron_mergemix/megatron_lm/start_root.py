"""A checkpoint root that holds one given save, whatever its own root points at by now."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_mergemix.checkpoint.saves import TRACKER
from megatron_mergemix.files.publishing import publish_text


def start_root(folder: Path, save: Path) -> Path:
    """Return ``folder``, made into a root whose ``release`` is ``save``.

    For Megatron-LM's ``--load``, which takes the newest save of a root; every rank may call it.

    Args:
        folder: made where it is missing; the same save leaves it as it is.
        save: one iteration's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    link, target = folder / "release", save.resolve()
    if not link.is_symlink() or link.readlink() != target:
        temporary = folder / f".release.{os.uname().nodename}.{os.getpid()}"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        os.replace(temporary, link)
    if not (folder / TRACKER).exists():
        publish_text(folder / TRACKER, "release")
    return folder
