"""Words of the study's commands, and where its steps leave checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from steps import Folder


def words_of(config: Path, folder: Path, settings: Sequence[str]) -> list[str]:
    """Return the words that name an experiment: its file, where it works, what is set."""
    pairs = [f"run_dir={folder / 'run'}", *settings]
    return [str(config), *(word for pair in pairs for word in ("--set", pair))]


def score(
    at: Folder, words: Sequence[str], flag: str, models: Sequence[str], file: str = "scores.json"
) -> None:
    """Score models by one command; a merge weight's flag takes several words."""
    flags = [word for model in models for word in (flag, *model.split(" "))]
    at.mergemix("evaluate", *words, *flags, "--json", str(at.path / file))


def from_base(first: Path) -> list[str]:
    """Return the setting that takes the base of another step."""
    return [f"base={{checkpoint: {base_checkpoint(first)}}}"]


def base_checkpoint(first: Path) -> Path:
    """Return the base that a step has trained."""
    return first / "run" / "base" / "checkpoints"


def reference_checkpoint(folder: Path, reference: str) -> str:
    """Return a reference model that a step has trained: the mean of its last saves."""
    run = folder / "run" / "references" / reference
    finished = json.loads((run / "finished.json").read_text())
    return str(run / finished["checkpoint"])


def last_save(run: Path) -> str:
    """Return the last save of a run, where others take the mean."""
    return str(run / "checkpoints")


def expert_checkpoint(folder: Path, expert: str) -> str:
    """Return an expert that a step has trained or will: the mean of its last saves."""
    return str(folder / "run" / "experts" / expert / "checkpoints" / "averaged")


def expert_checkpoints(folder: Path, experts: Sequence[str]) -> str:
    """Return the experts of a step as a YAML mapping."""
    return ", ".join(f"{name}: {expert_checkpoint(folder, name)}" for name in experts)


def as_shares(mixture: Mapping[str, float]) -> str:
    """Return a mixture as ``mergemix evaluate --mixture`` takes it."""
    return ",".join(f"{domain}={share!r}" for domain, share in mixture.items())


def as_weights(mixture: Mapping[str, float]) -> str:
    """Return a mixture as the words of ``mergemix evaluate --alpha``."""
    return " ".join(f"{domain}={share!r}" for domain, share in mixture.items())
