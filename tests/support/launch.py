"""An experiment of the user's own launch, before any launch and after."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_mergemix.config import Config, ModelFacts, load_config
from megatron_mergemix.model_facts import record_launch, with_recorded_launch
from tests.support.untrained import given, write_config

FACTS = ModelFacts(
    seq_length=8,
    global_batch_size=4,
    scoring={"num_layers": 1},
    training={"model": {"num_layers": 1}, "training": {"optimizer": "adam", "save_interval": 3}},
)
COMMAND = "torchrun --nproc-per-node 1 -m megatron_mergemix.launch pretrain_gpt.py --bf16"


def write_launch(home: Path, slurm: Mapping[str, Any], command: str = COMMAND) -> Path:
    """Write the experiment; return the path of its YAML."""
    path = write_config(home)
    changes = {
        "model": None,
        "training": {},
        "base": {"checkpoint": str(given(path, "base", 1.0))},
        "launch": {"kind": "command", "command": command},
        "slurm": dict(slurm),
    }
    return write_config(home, changes)


def after_a_launch(path: Path) -> Config:
    """Put on record what a first launch would, and return the experiment with it."""
    record_launch(load_config(path).model_copy(update={"launched": FACTS}))
    return with_recorded_launch(load_config(path))
