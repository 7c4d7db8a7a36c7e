"""Every path of an experiment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mergemix.files.lock import Lock
from megatron_mergemix.files.publishing import publish_json


@dataclass(frozen=True)
class RunDir:
    """Where an experiment keeps its files; nothing is created before something is written.

    Attributes:
        root: ``run_dir`` of the configuration.
    """

    root: Path

    @property
    def base(self) -> Path:
        """Return the folder of a base that is trained here."""
        return self.root / "base"

    def expert(self, name: str) -> Path:
        """Return the folder of the run that trains one expert."""
        return self.root / "experts" / name

    def reference(self, name: str) -> Path:
        """Return the folder of the run that trains one reference model."""
        return self.root / "references" / name

    @property
    def cache(self) -> Path:
        """Return the folder of Megatron's dataset index files, a folder in it for each run.

        Megatron writes them in place, so runs that may be trained at the same time share none.
        """
        return self.root / "cache"

    @property
    def config(self) -> Path:
        """Return the file with the resolved configuration, every default written out."""
        return self.root / "config.json"

    @property
    def launch(self) -> Path:
        """Return the file with what a Megatron-LM launch says about its model."""
        return self.root / "launch.json"

    @property
    def trials(self) -> Path:
        """Return the journal of the search."""
        return self.root / "search" / "trials.jsonl"

    @property
    def result(self) -> Path:
        """Return the file with what the search recommends."""
        return self.root / "search" / "result.json"

    def expert_tokens(self, name: str) -> Path:
        """Return the file with what an expert says of every held-out token."""
        return self.root / "search" / "ensemble" / f"{name}.npz"

    @property
    def commands(self) -> Path:
        """Return the folder of the output of commands that scored candidates."""
        return self.root / "search" / "commands"

    @property
    def held_out(self) -> Path:
        """Return the file with scores on items that the search never saw."""
        return self.root / "search" / "held_out.json"

    @property
    def evaluate(self) -> Path:
        """Return the folder of what ``mergemix evaluate`` and the stage evaluate measured."""
        return self.root / "evaluate"

    @property
    def scratch(self) -> Path:
        """Return the folder of candidates on disk that do not fit into memory."""
        return self.root / "scratch"

    @property
    def blend(self) -> Path:
        """Return the folder of the files that hand the mixture to Megatron."""
        return self.root / "blend"

    @property
    def validation(self) -> Path:
        """Return the file with what the reference models say about the search."""
        return self.root / "validate" / "result.json"

    @property
    def diagnosis(self) -> Path:
        """Return the file with what ``mergemix diagnose`` says about the experts."""
        return self.root / "diagnose" / "result.json"

    @property
    def diagnosis_measured(self) -> Path:
        """Return the file with the numbers that a diagnosis is computed from."""
        return self.root / "diagnose" / "measured.json"

    @property
    def report(self) -> Path:
        """Return the page that shows the experiment."""
        return self.root / "report.html"

    @property
    def slurm(self) -> Path:
        """Return the folder of the jobs that were submitted to a cluster."""
        return self.root / "slurm"

    def put_on_record(self, settings: Any) -> None:
        """Write the settings for those that read the folder, such as ``mergemix report``.

        While a verb of ``mergemix`` is at work it has written its own, which its stages go by.
        """
        if self.lock("run").holder() is None:
            publish_json(self.config, settings)

    def tensorboard(self, what: str) -> Path:
        """Return the TensorBoard folder of one run: ``"search"``, ``"experts/math"``."""
        return self.root / "tensorboard" / what

    def log(self, what: str) -> Path:
        """Return the log file of one process or job."""
        return self.root / "logs" / f"{what}.log"

    def lock(self, what: str) -> Lock:
        """Return the lock that keeps a second start out: ``"run"``, ``"experts/math"``, ..."""
        return Lock(self.root / f"{what}.lock", f"{what} in {self.root}")
