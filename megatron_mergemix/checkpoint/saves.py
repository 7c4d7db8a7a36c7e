"""Find the saves under a path, and say what is wrong with what is not a complete one."""

from __future__ import annotations

import json
import re
from pathlib import Path

from megatron_mergemix.checkpoint.metadata import entry_names
from megatron_mergemix.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron's name for the file that tells the newest complete save of a root."""


def resolve(path: Path) -> Path:
    """Return the folder of one complete ``torch_dist`` save.

    Args:
        path: a root with a tracker file, whose newest save is meant, or one iteration's folder.

    Raises:
        CheckpointError: there is no such folder, the save is incomplete, or it is of another
            format. Says how to convert it.
    """
    folder = folder_of(path)
    check_complete(folder)
    return folder


def folder_of(path: Path) -> Path:
    """Return the newest save's folder if ``path`` is a root with a tracker file, else ``path``.

    Raises:
        CheckpointError: there is no such folder.
    """
    if not path.is_dir():
        problem = "is not a folder" if path.exists() else "does not exist"
        raise CheckpointError(f"Checkpoint {path} {problem}. Name a root or an iteration's folder.")
    return _tracked(path) if (path / TRACKER).is_file() else path


def complete_saves(root: Path) -> list[tuple[int, Path]]:
    """Return the complete ``iter_*`` saves under ``root`` as (iteration, folder), oldest first.

    Raises:
        CheckpointError: ``root`` is not a folder.
    """
    if not root.is_dir():
        raise CheckpointError(f"Checkpoint root {root} is not a folder.")
    saves = []
    for folder in root.iterdir():
        match = re.fullmatch(r"iter_(\d+)", folder.name)
        if match and _is_whole(folder / "metadata.json") and (folder / ".metadata").is_file():
            saves.append((int(match[1]), folder))
    return sorted(saves)


def _is_whole(metadata: Path) -> bool:
    """Return whether the file that Megatron writes last is there, and not torn by a kill."""
    try:
        return isinstance(json.loads(metadata.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def check_complete(folder: Path) -> None:
    """Check that ``folder`` holds one complete ``torch_dist`` save.

    Raises:
        CheckpointError: it does not; says what it holds instead and what to do.
    """
    names = {entry.name for entry in folder.iterdir()}
    if "metadata.json" in names:
        _check_backend(folder)
        if ".metadata" not in names:
            raise CheckpointError(
                f"{folder} has metadata.json but no .metadata, so parts of the save were lost. "
                "Copy it again with its hidden files."
            )
    elif any(name.startswith("mp_rank_") for name in names):
        raise CheckpointError(
            f"{folder} is in the legacy torch format (mp_rank_* folders). Convert it: load it in "
            "Megatron-LM with --ckpt-convert-format torch_dist --ckpt-convert-save DIR."
        )
    elif ".metadata" in names and "common.pt" not in names:
        raise CheckpointError(_without_config(folder))
    elif ".metadata" in names or any(name.endswith((".distcp", "common.pt")) for name in names):
        raise CheckpointError(_incomplete(folder))
    else:
        raise CheckpointError(_nothing_here(folder))


def _tracked(root: Path) -> Path:
    text = (root / TRACKER).read_text(errors="replace").strip()
    if text == "release":
        folder = root / "release"
    elif re.fullmatch(r"[0-9]{1,18}", text):
        folder = root / f"iter_{int(text):07d}"
    else:
        raise CheckpointError(
            f"{root / TRACKER} says {text[:40]!r}, expected an iteration or the word release."
        )
    if not folder.is_dir():
        raise CheckpointError(
            f"{root / TRACKER} names {folder.name}, which does not exist. {_choices(root)}"
        )
    return folder


def _check_backend(folder: Path) -> None:
    path = folder / "metadata.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}). Copy the checkpoint again, or name "
            "another save."
        ) from error
    backend = config.get("sharded_backend") if isinstance(config, dict) else None
    if backend == "zarr":
        raise CheckpointError(
            f"{folder} is in the zarr format, which Megatron Core dropped in 0.16. Load it with "
            "Megatron Core 0.15 or older and save it with --ckpt-format torch_dist."
        )
    if backend != "torch_dist" or config.get("sharded_backend_version") != 1:
        raise CheckpointError(
            f"{path} names the format {str(backend)[:40]!r}, version "
            f"{str(config.get('sharded_backend_version'))[:40] if backend else None}; expected "
            "'torch_dist', version 1. Save the checkpoint with --ckpt-format torch_dist."
        )


def _without_config(folder: Path) -> str:
    """Tell apart the formats that have ``.metadata`` and never a ``metadata.json``."""
    model_names = [name for name in entry_names(folder) if name.startswith("model.")]
    if not model_names:
        return _incomplete(folder)
    if any(name.startswith("model.module.") for name in model_names):
        return (
            f"{folder} is in the fsdp_dtensor format of Megatron-FSDP, which cannot be merged. "
            "Train the base and the experts without --use-megatron-fsdp and with --ckpt-format "
            "torch_dist."
        )
    return (
        f"{folder} is in the torch_dcp format of FSDP2, which cannot be merged. Train the base "
        "and the experts without --use-torch-fsdp2 and with --ckpt-format torch_dist."
    )


def _incomplete(folder: Path) -> str:
    return (
        f"{folder} has no metadata.json, which Megatron writes last: the save was killed or is "
        f"still being written. Wait for it, or name an earlier save. {_choices(folder.parent)}"
    )


def _nothing_here(folder: Path) -> str:
    return (
        f"{folder} has neither {TRACKER} nor .metadata, so it is neither a checkpoint root nor an "
        f"iteration's folder. {_choices(folder)}"
    )


def _choices(root: Path) -> str:
    saves = complete_saves(root)
    if not saves:
        return f"There are no complete saves in {root}."
    newest = ", ".join(folder.name for _, folder in saves[:-6:-1])
    more = f" and {len(saves) - 5} more" if len(saves) > 5 else ""
    return f"Complete saves in {root}: {newest}{more}."
