"""A tiny but complete experiment: three domains, a two-layer model, ranks on gloo."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.support.datasets import make_domains

DOMAINS = ("math", "code", "prose")

SETTINGS: dict[str, Any] = {
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "seq_length": 32,
        "make_vocab_size_divisible_by": 8,
    },
    "parallel": {"processes": 2, "tensor": 2},
    "training": {"global_batch_size": 16, "micro_batch_size": 8, "save_interval": 5},
    "base": {"train": {"tokens": 10240, "lr": 5e-3, "warmup_steps": 2}},
    "experts": {"tokens": 5120, "lr": 2e-3, "general_share": 0.25},
    "search": {"trials": 12, "surrogate": "gp"},
    "blend": {"train_tokens": 1e6, "split": "1,0,0"},
}


def write_experiment(directory: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """Make the datasets and ``mix.yaml`` in ``directory``, and return the YAML's path.

    Args:
        directory: made if missing; datasets that are there already are kept.
        changes: merged into the settings, section by section.
    """
    data = directory / "data"
    if not data.exists():
        make_domains(data, DOMAINS, [40000, 30000, 20000], held_out=0.2)
    settings = copy.deepcopy(SETTINGS)
    settings["run_dir"] = str(directory / "run")
    settings["domains"] = {name: {"prefixes": [str(data / name)]} for name in DOMAINS}
    settings["evaluate"] = {
        "capabilities": {
            name: {
                "loss": {
                    "prefixes": [str(data / f"{name}_heldout")],
                    "sequences": 13,
                    "metric": "bpb",
                }
            }
            for name in DOMAINS
        }
    }
    for section, values in (changes or {}).items():
        if isinstance(values, Mapping) and isinstance(settings.get(section), dict):
            settings[section].update(values)
        else:
            settings[section] = values
    path = directory / "mix.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path
