"""``integrity.json``: the SHA-256 of every file, as Megatron Core 0.19 and later write it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_mergemix.errors import CheckpointError

FILE = "integrity.json"
_BLOCK = 1 << 22


def verify(folder: Path, threads: int) -> bool:
    """Compare the files of a checkpoint with its manifest; False where it has none.

    Raises:
        CheckpointError: names every file that is missing or has changed, or the manifest is
            damaged.
    """
    path = folder / FILE
    if not path.exists():
        return False
    try:
        manifest = json.loads(path.read_text())
        algorithm, files = manifest["algorithm"], dict(manifest["files"])
        plain = all(isinstance(f, str) and f not in ("", "..") and "/" not in f for f in files)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}). Copy the checkpoint again, or name "
            "another save."
        ) from error
    if algorithm != "sha256" or not plain:
        raise CheckpointError(f"{path}: expected SHA-256 digests of files in this folder.")
    problems = [
        f"{name} is missing" if digest is None else f"{name} has changed"
        for name, digest in zip(files, _digests([folder / n for n in files], threads), strict=True)
        if digest != files[name]
    ]
    if problems:
        raise CheckpointError(
            f"Checkpoint {folder} is not what was saved: {', '.join(sorted(problems))}. Copy it "
            "again or name another save."
        )
    return True


def manifest_bytes(folder: Path, threads: int) -> bytes:
    """Return the manifest of the files that are in ``folder`` now."""
    files = sorted(entry for entry in folder.iterdir() if entry.is_file() and entry.name != FILE)
    digests = _digests(files, threads)
    table = {file.name: digest for file, digest in zip(files, digests, strict=True)}
    return json.dumps({"algorithm": "sha256", "files": table}, indent=2).encode()


def _digests(paths: Iterable[Path], threads: int) -> list[str | None]:
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(_digest, paths))


def _digest(path: Path) -> str | None:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    return digest.hexdigest()
