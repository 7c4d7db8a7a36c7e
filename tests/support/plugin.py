"""An experiment whose stages are launches of the real ``pretrain_gpt.py``, or of its siblings."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_mergemix.config import Config, load_config
from megatron_mergemix.model_facts import with_recorded_launch
from megatron_mergemix.search.journal import read_journal
from megatron_mergemix.training_runs.experiment_runs import expert_checkpoints, expert_run
from megatron_mergemix.trials import Trial
from tests.support.experiment import write_experiment
from tests.support.forked_launch import run_forked
from tests.support.megatron_lm import TINY_GPT, build_environment
from tests.support.processes import Command, mergemix

LAUNCHER = "megatron_mergemix.launch"
STEPS = 4

MODEL = (
    *TINY_GPT,
    *("--vocab-size", "257", "--swiglu", "--disable-bias-linear"),
    *("--position-embedding-type", "rope", "--lr", "3e-2", "--lr-decay-style", "cosine"),
    *("--eval-iters", "1", "--eval-interval", "100", "--train-iters", "100"),
)
TP2 = ("--tensor-model-parallel-size", "2")
PP2 = ("--pipeline-model-parallel-size", "2")
DP2: tuple[str, ...] = ()


@dataclass(frozen=True)
class Launches:
    """A checkout and an experiment on it; every method is a launch."""

    checkout: Path
    home: Path
    model: Sequence[str] = MODEL
    yaml_name: str = "mix.yaml"
    run_name: str = "run"
    launcher: str = LAUNCHER
    script: str = "pretrain_gpt.py"
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def run_dir(self) -> Path:
        """Where the experiment writes."""
        return self.home / self.run_name

    @property
    def config(self) -> Path:
        """The YAML."""
        return self.home / self.yaml_name

    def settings(self) -> Config:
        """Return the experiment as a stage sees it."""
        return with_recorded_launch(load_config(self.config))

    def trials(self) -> list[Trial]:
        """Return what the search wrote down."""
        return read_journal(self.run_dir / "search" / "trials.jsonl")[1]

    def mixture_of(self, expert: str) -> dict[str, float]:
        """Return what an expert is trained on: a reference of that mixture is the same run."""
        return dict(expert_run(self.settings(), expert).mixture)

    def write(self) -> None:
        """Make datasets, a base of real Megatron-LM and the YAML."""
        path = write_experiment(self.home)
        settings = yaml.safe_load(path.read_text())
        for section in ("model", "parallel", "training"):
            del settings[section]
        tokens = STEPS * 4 * 32
        settings |= {
            "base": {"checkpoint": str(self.home / "base")},
            "launch": {"kind": "command"},
            "experts": {"tokens": tokens, "lr": 1e-2},
            "search": {"trials": 6, "surrogate": "gp"},
        }
        for domain in settings["domains"].values():
            domain["bounds"] = [0.125, 0.75]  # so that the learned blend has them all
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
        saving = ("--save", str(self.home / "base"), "--save-interval", "4", "--train-iters", "4")
        done = self.stock("--mock-data", *saving)
        assert done.returncode == 0, done.stdout

    def stock(self, *more: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
        """Run it without the plugin's flags."""
        return self.complete(more, ranks)

    def stage(
        self, stage: str, *more: str, ranks: int = 1, expert: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run one stage to its end."""
        return self.complete(self.words(stage, *more, expert=expert), ranks)

    def words(self, stage: str, *more: str, expert: str | None = None) -> tuple[str, ...]:
        """Return the arguments of a stage after the model's."""
        flags = ["--mergemix-config", str(self.config), "--mergemix-stage", stage]
        if expert is not None:
            flags += ["--mergemix-expert", expert]
        return (*more, *flags)

    def complete(self, words: Sequence[str], ranks: int) -> subprocess.CompletedProcess[str]:
        """Run a launch to its end."""
        script, environment = self._script(words), self._environment()
        return run_forked(self.launcher, ranks, script, environment, 300, self.checkout)

    def start(self, words: Sequence[str], ranks: int) -> Command:
        """Start a launch with torchrun and leave it running."""
        home = self.home / "outputs"
        home.mkdir(exist_ok=True)
        return Command(self._command(words, ranks), home, self._environment())

    def run(self, *more: str, ranks: int) -> Command:
        """Start ``mergemix run`` with a launch command of that layout."""
        command = [sys.executable, *self._command(more, ranks)]
        setting = f"--set=launch.command={json.dumps(command)}"
        home = self.home / "outputs"
        home.mkdir(exist_ok=True)
        return mergemix(self.config, "run", setting, home=home, environment=self._environment())

    def with_settings(self, name: str, changes: Mapping[str, Any]) -> Launches:
        """Return the same launches with another YAML beside the first."""
        settings = yaml.safe_load(self.config.read_text())
        for key, value in changes.items():
            settings[key] = (
                {**settings.get(key, {}), **value} if isinstance(value, Mapping) else value
            )
        (self.home / f"{name}.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        return replace(self, yaml_name=f"{name}.yaml", run_name=Path(settings["run_dir"]).name)

    def on_same_experts(
        self,
        name: str,
        capabilities: Mapping[str, Any],
        weights: Mapping[str, float] | None = None,
        **more: Any,
    ) -> Launches:
        """Return an experiment on these experts that measures more, its launch on record.

        Args:
            name: of its YAML and its run_dir.
            capabilities: beside those of this experiment.
            weights: in the utility, of those that do not count as 1.
            more: sections of its YAML.
        """
        config = self.settings()
        own = {
            name: each.model_dump(mode="json", exclude_none=True)
            for name, each in config.evaluate.capabilities.items()
        }
        experts = {name: str(path) for name, path in expert_checkpoints(config).items()}
        settings: dict[str, Any] = {
            "run_dir": str(self.home / name),
            "experts": {"checkpoints": experts},
            "evaluate": {
                "capabilities": own | dict(capabilities),
                "utility": {"weights": dict.fromkeys([*own, *capabilities], 1) | (weights or {})},
            },
        }
        other = self.with_settings(name, settings | more)
        other.run_dir.mkdir()
        record = "launch.json"
        (other.run_dir / record).write_bytes((self.run_dir / record).read_bytes())
        return other

    def _command(self, more: Sequence[str], ranks: int) -> list[str]:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        return [*torchrun, "-m", self.launcher, *self._script(more)]

    def _script(self, more: Sequence[str]) -> list[str]:
        return [str(self.checkout / self.script), *self._arguments(more)]

    def _environment(self) -> dict[str, str]:
        return build_environment() | dict(self.environment)

    def _arguments(self, more: Sequence[str]) -> list[str]:
        # The rows of the embedding must not depend on the layout.
        rows = "64" if "--tensor-model-parallel-size" in more else "128"
        return [*self.model, "--make-vocab-size-divisible-by", rows, *more]


@dataclass(frozen=True)
class BigRun:
    """A training run of the user's own on two ranks, and where it writes."""

    home: Path
    layout: Sequence[str] = TP2

    @property
    def saves(self) -> Path:
        """Its checkpoint root, from which it also resumes."""
        return self.home / "saves"

    @property
    def cache(self) -> Path:
        """Where Megatron-LM's dataset builder writes which sample comes from where."""
        return self.home / "cache"

    def drawn(self) -> list[int]:
        """Return how many of its samples Megatron-LM drew from each dataset of the blend."""
        (index,) = self.cache.glob("*train*dataset_index.npy")
        counts: list[int] = np.bincount(np.load(index)[: 4 * STEPS]).tolist()
        return counts

    @property
    def output(self) -> Path:
        """What it printed, where somebody wrote it down."""
        return self.home / "output"

    @property
    def words(self) -> tuple[str, ...]:
        """Its arguments; the data are to be replaced."""
        places = ("--save", str(self.saves), "--load", str(self.saves))
        length = ("--train-iters", str(STEPS), "--save-interval", "1")
        return (*self.layout, *places, *length, "--data-cache-path", str(self.cache), "--mock-data")


def assert_same_scores(ours: Sequence[Trial], theirs: Sequence[Trial], rtol: float) -> None:
    """Compare the trials that the design asks for; what is verified depends on the scores."""
    ours, theirs = (
        [trial for trial in trials if not trial.purpose.startswith("verify")]
        for trials in (ours, theirs)
    )
    assert len(ours) >= 6
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.mixture == other.mixture
        for capability, metrics in mine.scores.items():
            for metric, score in metrics.items():
                expected = other.scores[capability][metric].value
                np.testing.assert_allclose(score.value, expected, rtol=rtol)
