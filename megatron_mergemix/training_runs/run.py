"""One training run: what decides its result, and whether it is done.

A run is described by everything that decides its result: architecture, data, seeds, schedule and
the checkpoint it starts from, but neither the parallel layout nor where data lies. Its digest
tells a finished run from a stale one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mergemix.checkpoint.saves import resolve
from megatron_mergemix.errors import TrainingError
from megatron_mergemix.files.publishing import publish_json
from megatron_mergemix.training_runs import seconds


@dataclass(frozen=True)
class TrainingRun:
    """One training run, by the built-in trainer or by a launch of the user's own.

    Attributes:
        name: ``"base"``, ``"experts/math"``, ``"references/uniform"``.
        directory: where its save, its description and its result go.
        mixture: share of training tokens per domain.
        blend: the mixture as weight and prefix pairs.
        steps: optimizer steps.
        lr: constant learning rate after ``warmup_steps``.
        seed: of initialisation and data order.
        start: iteration folder that the weights come from, or None for fresh weights.
        averaged_steps: the result is the mean of the saves of these steps, in order; the last
            one is ``steps``.
        description: everything that decides the result, as plain JSON values.
    """

    name: str
    directory: Path
    mixture: Mapping[str, float]
    blend: tuple[tuple[float, str], ...]
    steps: int
    lr: float
    warmup_steps: int
    seed: int
    start: Path | None
    averaged_steps: tuple[int, ...]
    description: Mapping[str, Any]

    @property
    def checkpoints(self) -> Path:
        """Return the checkpoint root, usable as Megatron's ``--load``."""
        return self.directory / "checkpoints"

    def digest(self) -> str:
        """Return the SHA-256 of the description."""
        text = json.dumps(self.description, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def is_finished(self) -> bool:
        """Return whether this very run is done.

        Raises:
            TrainingError: the directory holds another run; says what differs.
        """
        started = self.directory / "run.json"
        if not started.exists():
            return False
        before = json.loads(started.read_text())
        now = json.loads(json.dumps(self.description))
        if before["description"] != now:
            prefixes = [prefix for _, prefix in self.blend]
            what = _difference(_named(before["description"], prefixes), _named(now, prefixes))
            raise TrainingError(
                f"{self.directory} holds another run: {what}. Choose another run_dir, "
                f"or remove {self.directory} to train again."
            )
        return (self.directory / "finished.json").exists()

    def mark_started(self) -> None:
        """Make the folders, write ``run.json`` and note that the run works from now on."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        publish_json(
            self.directory / "run.json",
            {"digest": self.digest(), "description": self.description},
        )
        seconds.begin(self.directory)

    def mark_finished(self, result: Mapping[str, Any]) -> None:
        """Write ``finished.json``, which makes the run count as done, with its wall seconds."""
        worked = seconds.worked(self.directory)
        finished = {"digest": self.digest(), **result, "seconds": worked}
        publish_json(self.directory / "finished.json", finished)

    def final_checkpoint(self) -> Path:
        """Return the iteration folder that the run ended with.

        Raises:
            TrainingError: the run is not finished, or the directory holds another run.
        """
        path = self.directory / "finished.json"
        if not self.is_finished():
            raise TrainingError(
                f"{self.name} is not trained yet ({self.directory} has no finished.json). "
                f"Run `mergemix train mix.yaml {self.name.replace('s/', ':')}` first."
            )
        return resolve(self.directory / json.loads(path.read_text())["checkpoint"])


def _named(description: Mapping[str, Any], prefixes: Sequence[str]) -> dict[str, Any]:
    """Return a description whose datasets have names, so that a difference can be read."""
    blend = description.get("blend")
    if not isinstance(blend, list) or len(blend) != len(prefixes):
        return dict(description)
    return {**description, "blend": dict(zip(prefixes, blend, strict=True))}


def _difference(before: Any, now: Any) -> str:
    """Return the first few entries in which two descriptions differ, as ``key: old -> new``."""
    found: list[str] = []

    def walk(old: Any, new: Any, where: str) -> None:
        if isinstance(old, dict) and isinstance(new, dict):
            for key in sorted(set(old) | set(new)):
                walk(old.get(key), new.get(key), f"{where}.{key}" if where else key)
        elif old != new:
            found.append(f"{where}: {_short(old)} -> {_short(new)}")

    walk(before, now, "")
    more = f", and {len(found) - 4} more" if len(found) > 4 else ""
    return ", ".join(found[:4]) + more


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
