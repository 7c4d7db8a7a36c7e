"""Experiments to measure the search with: a base, experts near it, and text to score, no training.

The weights are random: what a candidate costs does not depend on what a model has learned. The
experts lie as far from the base as a short run leaves them, so that mixtures have different losses.
"""

from __future__ import annotations

import json
import os
import random
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_mergemix.config import Config, Model, load_config
from megatron_mergemix.data.prepare import prepare
from megatron_mergemix.megatron import parallel
from megatron_mergemix.megatron.dist_checkpoint import save
from megatron_mergemix.megatron.model import build_model
from megatron_mergemix.model_facts import vocab_size

STEP = 0.1
"""Distance of an expert from the base, in standard deviations of each weight matrix."""


def start_alone() -> None:
    """Make this process the only rank of a job in CPU mode, whatever launched it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), MERGEMIX_DEVICE="cpu")
    parallel.start(Config.model_fields["parallel"].get_default())


def write_experiment(
    folder: Path, model: dict[str, Any], experts: int, sequences: int, micro_batch_size: int
) -> Path:
    """Write text and ``mix.yaml`` of an experiment whose experts are given; return its path.

    Args:
        folder: made if missing.
        model: the section ``model`` of the YAML.
        experts: how many, one per domain.
        sequences: held-out windows.
        micro_batch_size: windows per forward pass.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held_out = folder / "held_out"
    if not held_out.with_suffix(".bin").exists():
        text = held_out.with_suffix(".txt")
        text.write_text(_text((sequences + 1) * model["seq_length"]))
        prepare([text], held_out)
    domains = [f"domain{number}" for number in range(experts)]
    loss = {"prefixes": [str(held_out)], "sequences": sequences}
    settings = {
        "run_dir": str(folder / "run"),
        "model": model,
        "base": {"checkpoint": str(folder / "base")},
        "domains": {name: {"prefixes": [str(folder / "data" / name)]} for name in domains},
        "experts": {
            "general_share": 0.0,
            "checkpoints": {name: str(folder / name) for name in domains},
        },
        "evaluate": {
            "capabilities": {"text": {"loss": loss}},
            "micro_batch_size": micro_batch_size,
        },
    }
    path = folder / "mix.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def write_checkpoints(path: Path) -> list[torch.nn.Module]:
    """Write base and experts of an experiment where they are missing; return a live model.

    Needs :func:`start_alone`.
    """
    config = load_config(path)
    chunks = build_model(config, vocab_size(config), seed=1)
    assert config.base.checkpoint is not None
    roots = {"base": config.base.checkpoint, **config.experts.checkpoints}
    if all(root.exists() for root in roots.values()):
        return chunks
    parameters = [parameter.data for parameter in chunks[0].parameters()]
    base = [parameter.clone() for parameter in parameters]
    for number, root in enumerate(roots.values()):
        generator = torch.Generator().manual_seed(number)
        for parameter, start in zip(parameters, base, strict=True):
            parameter.copy_(start)
            if number > 0 and start.dim() > 1:
                noise = torch.randn(start.shape, generator=generator)
                parameter.add_((STEP * start.std() * noise).to(start.dtype))
        save(root, 1, chunks, {}, keep=1)
    return chunks


def candidates(experts: Sequence[str], count: int) -> list[dict[str, float]]:
    """Return merge weights of mixtures that have something of every expert."""
    rng = random.Random(0)
    found = []
    for _ in range(count):
        shares = [rng.uniform(0.2, 1.0) for _ in experts]
        found.append(
            {name: share / sum(shares) for name, share in zip(experts, shares, strict=True)}
        )
    return found


def _text(characters: int) -> str:
    rng = random.Random(0)
    words = [
        "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(500)
    ]
    text = " ".join(rng.choices(words, k=characters // 3))
    assert len(text) >= characters
    return text


def write_llama(folder: Path, chunk: Any, model: Model) -> None:
    """Write the weights of a live model as a Hugging Face Llama checkpoint, if it is missing.

    Megatron keeps queries, keys and values of a head together, and gate and up in one matrix.
    """
    if folder.exists():
        return
    heads, hidden = model.num_attention_heads, model.hidden_size
    state = {name: tensor.detach().float() for name, tensor in chunk.named_parameters()}
    tensors = {
        "model.embed_tokens.weight": state["embedding.word_embeddings.weight"],
        "model.norm.weight": state["decoder.final_layernorm.weight"],
    }
    for layer in range(model.num_layers):
        here, there = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        qkv = state[here + "self_attention.linear_qkv.weight"].view(heads, 3, -1, hidden)
        for part, name in enumerate("qkv"):
            tensors[f"{there}self_attn.{name}_proj.weight"] = qkv[:, part].reshape(hidden, hidden)
        gate, up = state[here + "mlp.linear_fc1.weight"].chunk(2)
        tensors |= {
            there + "self_attn.o_proj.weight": state[here + "self_attention.linear_proj.weight"],
            there + "mlp.gate_proj.weight": gate,
            there + "mlp.up_proj.weight": up,
            there + "mlp.down_proj.weight": state[here + "mlp.linear_fc2.weight"],
            there + "input_layernorm.weight": state[here + "input_layernorm.weight"],
            there + "post_attention_layernorm.weight": state[here + "pre_mlp_layernorm.weight"],
        }
    folder.mkdir(parents=True)
    _write_safetensors(folder / "model.safetensors", tensors)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": model.ffn_width(),
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": heads,
        "vocab_size": len(tensors["model.embed_tokens.weight"]),
        "max_position_embeddings": model.seq_length,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": float(model.rotary_base),
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))


def _write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    header, end = {}, 0
    for name, tensor in tensors.items():
        size = 4 * tensor.numel()
        shape = list(tensor.shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().numpy().tobytes())
