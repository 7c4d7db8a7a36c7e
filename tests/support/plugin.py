"""An experiment whose stages are launches of the real ``pretrain_gpt.py``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from tests.support.experiment import write_experiment
from tests.support.megatron_lm import TINY_GPT, build_environment, run_pretrain_gpt
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

    @property
    def run_dir(self) -> Path:
        """Where the experiment writes."""
        return self.home / self.run_name

    @property
    def config(self) -> Path:
        """The YAML."""
        return self.home / self.yaml_name

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
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
        saving = ("--save", str(self.home / "base"), "--save-interval", "4", "--train-iters", "4")
        done = self.stock("--mock-data", *saving)
        assert done.returncode == 0, done.stdout

    def stock(self, *more: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
        """Run it without the plugin's flags."""
        return self._run(ranks, more)

    def stage(
        self, stage: str, *more: str, ranks: int = 1, expert: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run one stage to its end."""
        return self._run(ranks, self.words(stage, *more, expert=expert))

    def words(self, stage: str, *more: str, expert: str | None = None) -> tuple[str, ...]:
        """Return the arguments of a stage after the model's."""
        flags = ["--mergemix-config", str(self.config), "--mergemix-stage", stage]
        if expert is not None:
            flags += ["--mergemix-expert", expert]
        return (*more, *flags)

    def start(self, words: Sequence[str], ranks: int) -> Command:
        """Start a launch and leave it running."""
        home = self.home / "outputs"
        home.mkdir(exist_ok=True)
        return Command(self._command(words, ranks), home, build_environment())

    def run(self, *more: str, ranks: int) -> Command:
        """Start ``mergemix run`` with a launch command of that layout."""
        command = [sys.executable, *self._command(more, ranks)]
        setting = f"--set=launch.command={json.dumps(command)}"
        home = self.home / "outputs"
        home.mkdir(exist_ok=True)
        return mergemix(self.config, "run", setting, home=home, environment=build_environment())

    def with_settings(self, name: str, changes: Mapping[str, Any]) -> Launches:
        """Return the same launches with another YAML beside the first."""
        settings = yaml.safe_load(self.config.read_text())
        for key, value in changes.items():
            settings[key] = {**settings[key], **value} if isinstance(value, Mapping) else value
        (self.home / f"{name}.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        return replace(self, yaml_name=f"{name}.yaml", run_name=Path(settings["run_dir"]).name)

    def _command(self, more: Sequence[str], ranks: int) -> list[str]:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        script = str(self.checkout / "pretrain_gpt.py")
        return [*torchrun, "-m", LAUNCHER, script, *self._arguments(more)]

    def _arguments(self, more: Sequence[str]) -> list[str]:
        # The rows of the embedding must not depend on the layout.
        rows = "64" if "--tensor-model-parallel-size" in more else "128"
        return [*self.model, "--make-vocab-size-divisible-by", rows, *more]

    def _run(self, ranks: int, more: Sequence[str]) -> subprocess.CompletedProcess[str]:
        arguments = self._arguments(more)
        return run_pretrain_gpt(self.checkout, ranks, arguments, launcher=LAUNCHER, timeout=300)
