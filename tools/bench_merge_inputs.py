"""Checkpoints to measure merging with: Megatron's, and Hugging Face's with as many parameters."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from megatron_mergemix.checkpoint.archive_writer import TensorArchive
from megatron_mergemix.checkpoint.index import CheckpointIndex, Chunk, TensorEntry
from megatron_mergemix.checkpoint.metadata_writer import metadata_bytes

EXPERTS = ("a", "b", "c")
VOCABULARY = 32768


def shapes(parameters: float) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of a llama-like GPT of about that many parameters."""
    hidden = 2048 if parameters > 2e8 else 256
    layers = max(1, round((parameters - VOCABULARY * hidden) / (12 * hidden**2)))
    layer = "decoder.layers."
    return {
        "embedding.word_embeddings.weight": (VOCABULARY, hidden),
        layer + "self_attention.linear_qkv.weight": (layers, 3 * hidden, hidden),
        layer + "self_attention.linear_proj.weight": (layers, hidden, hidden),
        layer + "self_attention.linear_qkv.layer_norm_weight": (layers, hidden),
        layer + "mlp.linear_fc1.layer_norm_weight": (layers, hidden),
        layer + "mlp.linear_fc1.weight": (layers, 5 * hidden, hidden),
        layer + "mlp.linear_fc2.weight": (layers, hidden, 3 * hidden),
        "decoder.final_layernorm.weight": (hidden,),
    }


def random_bf16(count: int, seed: int) -> Iterator[bytes]:
    """Yield blocks of normally distributed bf16 numbers."""
    rng = np.random.default_rng(seed)
    block = (rng.standard_normal(1 << 20, dtype=np.float32) * 0.02).view(np.uint32) >> 16
    data = block.astype(np.uint16).tobytes()
    for start in range(0, 2 * count, len(data)):
        yield data[: min(len(data), 2 * count - start)]


def write_megatron(folder: Path, parameters: float, seed: int, moments: bool) -> None:
    """Write a torch_dist checkpoint, one chunk per layer, in two files.

    With ``moments``, Adam's state and the master weights lie in the same files, in fp32. Their
    elements are holes, which take no disk: a merge has no business there.
    """
    folder.mkdir(parents=True)
    tensors: dict[str, TensorEntry] = {}
    wanted = {name: (shape, "bfloat16") for name, shape in shapes(parameters).items()}
    if moments:
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            for name, shape in shapes(parameters).items():
                wanted[f"optimizer.state.{kind}.{name}"] = (shape, "float32")
    with (folder / "__0_0.distcp").open("wb") as one, (folder / "__0_1.distcp").open("wb") as two:
        for number, (name, (shape, dtype)) in enumerate(wanted.items()):
            chunks = []
            for layer in range(shape[0] if "layers" in name else 1):
                offsets = (
                    (layer, *(0 for _ in shape[1:])) if "layers" in name else (0,) * len(shape)
                )
                sizes = (1, *shape[1:]) if "layers" in name else shape
                file = one if number % 2 else two
                archive, start = TensorArchive(dtype, sizes), file.tell()
                before, length = archive.lengths()
                crc = 0
                file.seek(start + before)
                if dtype == "bfloat16":
                    for block in random_bf16(archive.num_bytes // 2, seed + layer):
                        file.write(block)
                        crc = zlib.crc32(block, crc)
                head, tail = archive.frame(crc)
                file.seek(start + before + archive.num_bytes)
                file.write(tail)
                file.seek(start)
                file.write(head)
                file.seek(start + length)
                chunks.append(Chunk(offsets, sizes, Path(file.name).name, start, length))
            tensors[name] = TensorEntry(shape, dtype, tuple(chunks))
    (folder / ".metadata").write_bytes(metadata_bytes(CheckpointIndex(folder, None, tensors, {})))
    torch.save({"iteration": 0, "checkpoint_version": 3.0}, folder / "common.pt")
    config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(config))


def write_hugging_face(folder: Path, parameters: float, seed: int) -> None:
    """Write a llama model with as many parameters as :func:`write_megatron`."""
    folder.mkdir(parents=True)
    megatron = shapes(parameters)
    layers, hidden = megatron["decoder.layers.mlp.linear_fc1.layer_norm_weight"]
    tensors = {"model.embed_tokens.weight": (VOCABULARY, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        tensors |= {at + f"self_attn.{n}_proj.weight": (hidden, hidden) for n in "qkvo"}
        tensors |= {at + f"mlp.{n}_proj.weight": (8 * hidden // 3, hidden) for n in ("gate", "up")}
        tensors[at + "mlp.down_proj.weight"] = (hidden, 8 * hidden // 3)
        tensors |= {at + f"{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    header, end = {}, 0
    for name, shape in tensors.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for block in random_bf16(end // 2, seed):
            file.write(block)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 8 * hidden // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
