"""Legacy ``torch`` checkpoints for tests, as Megatron saves them, without Megatron."""

from __future__ import annotations

import argparse
import io
import random
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.support.checkpoint_family import saved_object

FILE = "model_optim_rng.pt"
EMBEDDING = "embedding.word_embeddings.weight"
NORM = "decoder.layers.0.input_layernorm.weight"
EXTRA_STATE = "decoder.layers.0.mlp.linear_fc1._extra_state"
RANKS: Mapping[str, tuple[dict[str, int], list[str]]] = {
    "one": ({}, ["mp_rank_00"]),
    "tensor": ({"tensor": 2}, ["mp_rank_00", "mp_rank_01"]),
    "pipeline": ({"pipeline": 2}, ["mp_rank_00_000", "mp_rank_00_001"]),
    "expert": ({"expert": 2}, ["mp_rank_00_000", "mp_rank_00_001"]),
    "virtual": ({"pipeline": 2}, ["mp_rank_00_000", "mp_rank_00_001"]),
    "both": (
        {"tensor": 2, "pipeline": 2},
        [f"mp_rank_{t:02d}_{p:03d}" for t in range(2) for p in range(2)],
    ),
}
"""Layout -> its parallel sizes and its folders. ``virtual`` has two model chunks per rank."""

Models = dict[str, dict[str, "OrderedDict[str, Any]"]]
"""Rank -> key, such as ``model0`` -> state dict."""


def random_models(
    layout: str, seed: int, dtype: torch.dtype = torch.bfloat16, near: Models | None = None
) -> Models:
    """Return every rank's models, copies and tied embeddings included, a step from ``near``."""
    sizes, ranks = RANKS[layout]
    models: Models = {}
    for rank in ranks:
        numbers = rank.split("_")[2:]
        stage = numbers[1] if "pipeline" in sizes else "000"
        keys = ["model0", "model1"] if layout == "virtual" else ["model"]
        for key in keys:
            model = OrderedDict()
            for name, (shape, copied_over) in shapes(stage, key, sizes).items():
                parts = tuple(n for n, axis in zip(numbers, sizes_of(numbers, sizes), strict=True)
                              if axis not in copied_over)  # fmt: skip
                tied = EMBEDDING if name == "output_layer.weight" else name
                where = parts if tied == EMBEDDING else (stage, key, *parts)
                generator = torch.Generator().manual_seed(
                    random.Random(f"{seed} {tied} {where}").randrange(1 << 40)
                )
                noise = torch.randn(shape, generator=generator)
                if near is not None:
                    noise = near[rank][key][name].float() + 0.1 * noise
                model[name] = noise.to(dtype)
            model[EXTRA_STATE] = io.BytesIO(saved_object({"recipe": None, "seed": seed}))
            model["decoder.final_layernorm._extra_state"] = None
            model["decoder.layers.0.router.tokens"] = torch.tensor([seed, 7])
            model._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
            models.setdefault(rank, {})[key] = model
    return models


def sizes_of(numbers: list[str], sizes: Mapping[str, int]) -> list[str]:
    """Return which axis each number in a folder's name belongs to."""
    return ["tensor", *(axis for axis in ("pipeline", "expert") if axis in sizes)][: len(numbers)]


def shapes(
    stage: str, key: str, sizes: Mapping[str, int]
) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Return name -> (shape on a rank, axes over which it is copied)."""
    split = sizes.get("tensor", 1)
    found: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
        NORM: ((6,), ("tensor", "expert")),
        "decoder.layers.0.mlp.linear_fc1.weight": ((10 // split, 6), ("expert",)),
        "decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight": ((4, 6), ()),
    }
    vocabulary = ((16 // split, 6), ("expert", "pipeline"))
    if stage == "000" and key != "model1":
        found = {EMBEDDING: vocabulary, **found}
    if stage == "001" and key != "model0":
        found["output_layer.weight"] = vocabulary
    return found


def write_legacy(
    folder: Path,
    layout: str,
    models: Models,
    iteration: int = 3,
    buffer: bool = False,
    **more: Any,
) -> Path:
    """Write an iteration folder; ``more`` goes into the dictionary of every rank.

    With ``buffer`` the parameters of a rank lie in one storage, as under the distributed optimizer.
    """
    sizes, ranks = RANKS[layout]
    args = argparse.Namespace(
        tensor_model_parallel_size=sizes.get("tensor", 1),
        pipeline_model_parallel_size=sizes.get("pipeline", 1),
        expert_model_parallel_size=sizes.get("expert", 1),
        expert_tensor_parallel_size=sizes.get("tensor", 1),
        seq_length=8,
        consumed_train_samples=10 * iteration,
        iteration=iteration,
        params_dtype=torch.bfloat16,
    )
    for rank in ranks:
        state = {
            "args": args,
            "checkpoint_version": 3.0,
            "iteration": iteration,
            **(in_one_buffer(models[rank]) if buffer else models[rank]),
            "optimizer": {
                "state": {0: {"exp_avg": torch.ones(6)}},
                "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95)}],
            },
            "opt_param_scheduler": {"max_lr": 0.1},
            "rng_state": [
                {
                    "random_rng_state": random.getstate(),
                    "np_rng_state": np.random.get_state(),
                    "torch_rng_state": torch.get_rng_state(),
                }
            ],
            **more,
        }
        (folder / rank).mkdir(parents=True, exist_ok=True)
        torch.save(state, folder / rank / FILE)
    return folder


def in_one_buffer(models: Mapping[str, OrderedDict[str, Any]]) -> dict[str, OrderedDict[str, Any]]:
    """Return the models with their float tensors as views of one storage, with gaps."""
    views = {}
    for key, model in models.items():
        floats = {name: t for name, t in model.items() if is_weight(t)}
        padded = {name: (t.numel() + 63) // 64 * 64 for name, t in floats.items()}
        buffer = torch.full((sum(padded.values()),), 5.0, dtype=next(iter(floats.values())).dtype)
        start, copy = 0, OrderedDict(model)
        for name, tensor in floats.items():
            copy[name] = buffer[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)
            start += padded[name]
        views[key] = copy
    return views


def is_weight(value: object) -> bool:
    """Say whether a value of a state dict is a tensor that is merged."""
    return isinstance(value, Tensor) and value.is_floating_point()


def read_legacy_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return rank -> what torch reads; of merges with those globals alone that Megatron allows."""
    torch.serialization.add_safe_globals([argparse.Namespace, io.BytesIO])
    return {
        path.parent.name: torch.load(path, weights_only=folder.name == "release")
        for path in sorted(folder.glob(f"mp_rank_*/{FILE}"))
    }


def write_legacy_family(
    root: Path, layout: str, dtype: torch.dtype = torch.bfloat16, buffer: bool = False
) -> tuple[dict[str, Path], dict[str, Models]]:
    """Write a base and two experts; return folders and models by name."""
    base = random_models(layout, 0, dtype)
    models = {"base": base}
    models |= {n: random_models(layout, seed, dtype, base) for seed, n in ((1, "a"), (2, "b"))}
    folders = {
        name: write_legacy(root / name / "iter_0000003", layout, model, buffer=buffer)
        for name, model in models.items()
    }
    return folders, models
