"""A base and experts on disk, small, in several chunkings, with everything a real save has."""

from __future__ import annotations

import argparse
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tests.support.torch_dist import write_checkpoint

EXTRA_STATE = "decoder.layers.mlp.linear_fc1._extra_state/shard_0_2"
OTHER_EXTRA_STATE = "decoder.layers.mlp.linear_fc1._extra_state/shard_1_2"
SHAPES: Mapping[str, tuple[int, ...]] = {
    "embedding.word_embeddings.weight": (16, 6),
    "decoder.layers.mlp.linear_fc1.weight": (2, 10, 6),
    "decoder.layers.mlp.experts.experts.linear_fc1.weight": (2, 3, 4, 5),
    "decoder.layers.mlp.router.weight": (2, 3, 6),
    "decoder.final_layernorm.weight": (6,),
}
GRIDS: Sequence[Mapping[str, Sequence[int]]] = (
    {},
    {
        "embedding.word_embeddings.weight": (2, 1),
        "decoder.layers.mlp.linear_fc1.weight": (2, 2, 1),
        "decoder.layers.mlp.experts.experts.linear_fc1.weight": (2, 3, 1, 1),
        "decoder.layers.mlp.router.weight": (2, 1, 1),
    },
    {
        "embedding.word_embeddings.weight": (3, 1),
        "decoder.layers.mlp.linear_fc1.weight": (2, 1, 3),
        "decoder.layers.mlp.experts.experts.linear_fc1.weight": (1, 1, 2, 2),
    },
)
"""Chunkings: whole, cut as tensor and MoE parallel ranks do, and across."""


def random_model(
    seed: int, dtype: torch.dtype = torch.bfloat16, near: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return tensors of ``SHAPES``, a step away from ``near`` if it is given."""
    generator = torch.Generator().manual_seed(seed)
    model = {}
    for name, shape in SHAPES.items():
        noise = torch.randn(shape, generator=generator)
        model[name] = (noise if near is None else near[name].float() + 0.1 * noise).to(dtype)
    return model


def write_save(
    folder: Path,
    model: Mapping[str, Tensor],
    chunking: int = 0,
    masters: Mapping[str, Tensor] | None = None,
    args: argparse.Namespace | None = None,
) -> Path:
    """Write an iteration folder with weights, optimizer state, extra state and common.pt."""
    tensors = {**model, "optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.ones(6)}
    for name, master in (masters or {}).items():
        tensors[f"optimizer.state.fp32_param.{name}"] = master
    objects = {EXTRA_STATE: saved_object([b"extra"]), OTHER_EXTRA_STATE: saved_object([None])}
    objects["rng_state/shard_0_1"] = saved_object([1])
    write_checkpoint(folder, tensors, GRIDS[chunking], objects, num_files=2 + chunking)
    args = args or argparse.Namespace(seq_length=8, consumed_train_samples=12, iteration=3)
    common = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 3,
        "optimizer": {"param_groups": [{"lr": 0.1, "step": torch.ones(1)}]},
        "content_metadata": {"singleton_local_shards": False},
    }
    (folder / "common.pt").write_bytes(saved_object(common))
    return folder


def saved_object(value: object) -> bytes:
    """Return what ``torch.save`` writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def write_family(
    root: Path, dtype: torch.dtype = torch.bfloat16
) -> tuple[dict[str, Path], dict[str, dict[str, Tensor]]]:
    """Write a base and two experts in three chunkings; return folders and tensors by name."""
    base = random_model(0, dtype)
    models = {"base": base}
    models |= {name: random_model(seed, dtype, near=base) for seed, name in ((1, "a"), (2, "b"))}
    folders = {
        name: write_save(root / name / "iter_0000003", model, chunking)
        for chunking, (name, model) in enumerate(models.items())
    }
    return folders, models
