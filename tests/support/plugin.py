"""An experiment whose stages are launches of the real ``pretrain_gpt.py``."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.support.experiment import write_experiment
from tests.support.megatron_lm import TINY_GPT, run_pretrain_gpt

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

    @property
    def run_dir(self) -> Path:
        """Where the experiment writes."""
        return self.home / "run"

    @property
    def config(self) -> Path:
        """The YAML."""
        return self.home / "mix.yaml"

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
        return self._run(1 if ranks == 1 else ranks, more)

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

    def _run(self, ranks: int, more: Sequence[str]) -> subprocess.CompletedProcess[str]:
        # The rows of the embedding must not depend on the layout.
        rows = "64" if "--tensor-model-parallel-size" in more else "128"
        arguments = [*self.model, "--make-vocab-size-divisible-by", rows, *more]
        launcher = "megatron_mergemix.launch"
        return run_pretrain_gpt(self.checkout, ranks, arguments, launcher=launcher, timeout=300)
