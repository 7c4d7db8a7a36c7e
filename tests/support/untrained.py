"""An experiment without any training: tiny datasets, ``mix.yaml``, checkpoints of one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from megatron_mergemix.config import Config, load_config
from tests.support.tiny_dataset import write_dataset
from tests.support.torch_dist import write_checkpoint

BYTE = {"kind": "byte", "path": None, "digest": "0", "vocab_size": 257, "eod": 256}
TOKENS = {"math": 600, "code": 300, "web": 100}
COMPONENTS = (
    "{algebra: {math: 0.8, web: 0.2}, code: {code: 1.0}, web: {web: 0.9, math: 0.1}, all: uniform}"
)


def write_config(home: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """Write datasets of 600, 300 and 100 tokens and ``mix.yaml``; return its path."""
    for name, count in TOKENS.items():
        documents = np.split(np.arange(count) % 250, 10)
        write_dataset(home / name, documents, BYTE)
        write_dataset(home / f"{name}_heldout", documents, BYTE)
    settings = {
        "run_dir": str(home / "run"),
        "model": {
            "num_layers": 1,
            "hidden_size": 8,
            "num_attention_heads": 2,
            "seq_length": 8,
            "make_vocab_size_divisible_by": 8,
        },
        "training": {"global_batch_size": 4, "micro_batch_size": 2, "save_interval": 3},
        "base": {"train": {"tokens": 320, "lr": 1e-3}},
        "domains": {name: {"prefixes": [str(home / name)]} for name in TOKENS},
        "experts": {"tokens": 330, "lr": 2e-3},
        "evaluate": {
            "capabilities": {
                name: {"loss": {"prefixes": [str(home / f"{name}_heldout")], "sequences": 3}}
                for name in TOKENS
            }
        },
        "blend": {"split": "1,0,0", "train_tokens": 1000},
        **(changes or {}),
    }
    path = home / "mix.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def with_base(path: Path, *overrides: str) -> Config:
    """Return the experiment with a given base, of which experts can be described."""
    folder = given(path, "base", 1.0)
    return load_config(path, [f"base={{checkpoint: {folder}}}", *overrides])


def with_experts(path: Path, *overrides: str) -> Config:
    """Return the experiment with a given base and given experts, ready to be searched."""
    experts = {name: str(given(path, name, 2.0 + i)) for i, name in enumerate(TOKENS)}
    return with_base(path, f"experts.checkpoints={experts}", *overrides)


def with_components(path: Path, *overrides: str) -> Config:
    """Return the experiment with a given base and four given experts that read two domains."""
    names = ("algebra", "code", "web", "all")
    experts = {name: str(given(path, name, 2.0 + i)) for i, name in enumerate(names)}
    checkpoints = f"experts.checkpoints={experts}"
    return with_base(path, f"experts.components={COMPONENTS}", checkpoints, *overrides)


def given(path: Path, name: str, value: float) -> Path:
    """Return the folder of a checkpoint that is full of ``value``, written if it is not there."""
    folder = path.parent / "given" / name / "iter_0000001"
    if not folder.exists():
        write_checkpoint(folder, {"embedding.word_embeddings.weight": torch.full((264, 8), value)})
    return folder
