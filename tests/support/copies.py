"""Copies of a trained experiment that a test may spoil."""

from __future__ import annotations

import shutil
from pathlib import Path


def copy_experiment(config_path: Path, directory: Path) -> Path:
    """Copy an experiment with its data and return the copy's ``mix.yaml``.

    Paths are rewritten in ``mix.yaml`` and in the descriptions of the runs, so that finished runs
    are recognised as done.

    Args:
        config_path: ``mix.yaml`` of the original, beside its data and its run_dir.
        directory: must not exist yet.
    """
    shutil.copytree(config_path.parent, directory)
    copy = directory / config_path.name
    for path in (copy, *directory.glob("run/**/run.json")):
        path.write_text(path.read_text().replace(str(config_path.parent), str(directory)))
    return copy
