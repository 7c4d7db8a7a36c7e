"""What steps leave behind, read back: mixtures, scores, searches."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mergemix.config import load_config
from megatron_mergemix.search.journal import read_journal
from megatron_mergemix.training_runs.mixtures import named_mixture
from megatron_mergemix.trials import Trial

Array = NDArray[np.float64]


def write_mixtures(folder: Path, words: Sequence[str]) -> None:
    """Write what the references of an experiment were trained on, by the words of its command."""
    config = load_config(words[0], words[2::2])
    found = {name: dict(named_mixture(config, m)) for name, m in config.references.items()}
    (folder / "mixtures.json").write_text(json.dumps(found, indent=1))


def mixtures(folder: Path) -> dict[str, dict[str, float]]:
    """Return name of a reference -> its mixture."""
    found: dict[str, dict[str, float]] = json.loads((folder / "mixtures.json").read_text())
    return found


def scores(folder: Path, file: str = "scores.json") -> Array:
    """Return bits per byte ``(models, domains)``, in the order in which they were asked for."""
    rows = json.loads((folder / file).read_text())
    return np.array(
        [[metrics["bpb"]["value"] for metrics in row["scores"].values()] for row in rows]
    )


def scores_of_windows(folder: Path, part: slice) -> Array:
    """Return the same of a part of the held-out windows of every domain, their plain mean."""
    rows = json.loads((folder / "scores.json").read_text())
    return np.array(
        [
            [np.mean(metrics["bpb"]["items"][part]) for metrics in row["scores"].values()]
            for row in rows
        ]
    )


def search_result(folder: Path) -> dict[str, Any]:
    """Return what a search recommends."""
    found: dict[str, Any] = json.loads((folder / "run" / "search" / "result.json").read_text())
    return found


def diagnosis(folder: Path) -> dict[str, Any]:
    """Return what was measured of experts, and what follows."""
    found: dict[str, Any] = json.loads((folder / "run" / "diagnose" / "result.json").read_text())
    return found


def search_trials(folder: Path) -> list[Trial]:
    """Return the trials of a search that measured a mixture."""
    _, trials = read_journal(folder / "run" / "search" / "trials.jsonl")
    return [trial for trial in trials if trial.mixture and trial.error is None]


def chosen_mixture(folder: Path) -> Mapping[str, float]:
    """Return the mixture that a step has chosen, a search or RegMix."""
    alone = folder / "mixture.json"
    if alone.exists():
        chosen: dict[str, float] = json.loads(alone.read_text())
        return chosen
    return dict(search_result(folder)["mixture"])
