"""The experts' token probabilities on disk: one file per expert, measured once per search.

A file names what it was measured on, is whole or not there, and is never measured again: a killed
search goes on with the next expert.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mergemix.errors import SearchError
from megatron_mergemix.files.publishing import publishing
from megatron_mergemix.mixtures.simplex import Array
from megatron_mergemix.search.journal import changed_digests

HEADER = "digests"


def write_tokens(path: Path, digests: Mapping[str, str], values: Mapping[str, Array]) -> None:
    """Write what one expert says of the held-out tokens.

    Args:
        path: the file, ``.npz``.
        digests: what the values depend on, by name.
        values: capability -> log-likelihood of every token in nats, any shape; kept as float32,
            which is what models compute it in.
    """
    arrays: dict[str, Any] = {
        f"capability.{name}": value.astype(np.float32) for name, value in values.items()
    }
    arrays[HEADER] = np.array(json.dumps(dict(digests)))
    with publishing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def has_tokens(path: Path, digests: Mapping[str, str]) -> bool:
    """Return whether the file is there.

    Raises:
        SearchError: it is, but damaged or measured on something else.
    """
    if not path.exists():
        return False
    with _opened(path) as file:
        _check(path, file, digests)
    return True


def read_tokens(
    paths: Mapping[str, Path], digests: Mapping[str, Mapping[str, str]]
) -> dict[str, Array]:
    """Return capability -> log-likelihoods of its tokens by the experts ``(T, K)``.

    Args:
        paths: expert -> its file.
        digests: expert -> what it must have been measured on.

    Raises:
        SearchError: a file is missing, damaged, or measured on something else.
    """
    experts = []
    for name, path in paths.items():
        if not has_tokens(path, digests[name]):
            raise SearchError(
                f"search.ensemble needs {path}, which the search measures before its first trial. "
                "It is gone: start the search again, it measures what is missing."
            )
        with _opened(path) as file:
            experts.append(
                {
                    key.removeprefix("capability."): file[key].ravel().astype(np.float64)
                    for key in file.files
                    if key != HEADER
                }
            )
    return {name: np.stack([expert[name] for expert in experts], axis=1) for name in experts[0]}


def _opened(path: Path) -> np.lib.npyio.NpzFile:
    try:
        opened: np.lib.npyio.NpzFile = np.load(path, allow_pickle=False)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise SearchError(
            f"{path} is damaged ({error}). Delete it and start the search again: it is measured "
            "anew."
        ) from error
    return opened


def _check(path: Path, file: np.lib.npyio.NpzFile, wanted: Mapping[str, str]) -> None:
    if changed := changed_digests(json.loads(str(file[HEADER])), wanted):
        raise SearchError(
            f"{path} was measured on something else: {'; '.join(changed)}. Undo the change to go "
            "on, or use another run_dir (or move search/ away) to search anew."
        )
