"""Checkpoints that Megatron Core itself writes, with optimizer state, from two tensor ranks."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron_mergemix.checkpoint.checks import check_compatible, check_intact
from megatron_mergemix.checkpoint.metadata import read_index
from megatron_mergemix.checkpoint.reader import CheckpointReader
from megatron_mergemix.checkpoint.saves import resolve
from tests.support.run_distributed import run_distributed


def save_and_read_back(root: str, tensor_parallel: int) -> dict[str, torch.Tensor]:
    """Save model, optimizer and RNG state; return every tensor as Megatron loads it."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing import ShardedObject

    parallel_state.initialize_model_parallel(tensor_parallel, 1)
    model, optimizer = _trained_one_step()
    weights = model.sharded_state_dict()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    state = {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(weights),
        "rng_state": ShardedObject("rng_state", [b"rng"], (1, world_size), (0, rank)),
        "args": Namespace(iteration=3),
        "iteration": 3,
    }
    folder = Path(root) / "iter_0000003"
    if rank == 0:
        folder.mkdir(parents=True)
        (Path(root) / "latest_checkpointed_iteration.txt").write_text("3")
    dist.barrier()
    dist_checkpointing.save(state, str(folder))
    dist.barrier()
    loaded = dist_checkpointing.load_plain_tensors(str(folder))
    return {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}


def _trained_one_step():
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        ffn_hidden_size=24,
        gated_linear_unit=True,
        add_bias_linear=False,
        use_cpu_initialization=True,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=64,
        max_sequence_length=8,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3), [wrapped])
    for parameter in model.parameters():
        parameter.main_grad.fill_(1)
    optimizer.step()
    return model, optimizer


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Tensor parallel size -> root of the checkpoint, and what Megatron loads from it."""
    folder = tmp_path_factory.mktemp("megatron")
    return {
        size: (
            folder / f"tp{size}",
            run_distributed(save_and_read_back, size, f"{folder}/tp{size}", size)[0],
        )
        for size in (1, 2)
    }


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_every_tensor_that_megatron_loads_is_in_the_index(tensor_parallel, written):
    root, tensors = written[tensor_parallel]
    index = read_index(resolve(root))
    assert index.iteration == 3
    assert {name: (t.shape, t.dtype) for name, t in index.tensors.items()} == {
        name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()
    }
    check_intact(index)


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_what_is_read_is_what_megatron_loads_bit_for_bit(tensor_parallel, written):
    root, tensors = written[tensor_parallel]
    reader = CheckpointReader(read_index(resolve(root)))
    for name, tensor in tensors.items():
        assert torch.equal(reader.read(name), tensor)
    name = "decoder.layers.mlp.linear_fc1.weight"
    assert torch.equal(reader.read(name, (1, 10, 3), (1, 30, 9)), tensors[name][1:, 10:40, 3:12])


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_the_model_is_the_model_and_nothing_else(tensor_parallel, written):
    root, tensors = written[tensor_parallel]
    index = read_index(resolve(root))
    layer, states = "decoder.layers.", "optimizer.state.exp_avg."
    assert {name: t.shape for name, t in index.model_tensors().items()} == {
        "embedding.word_embeddings.weight": (64, 16),
        layer + "self_attention.linear_qkv.layer_norm_weight": (2, 16),
        layer + "self_attention.linear_qkv.layer_norm_bias": (2, 16),
        layer + "self_attention.linear_qkv.weight": (2, 48, 16),
        layer + "self_attention.linear_proj.weight": (2, 16, 16),
        layer + "mlp.linear_fc1.layer_norm_weight": (2, 16),
        layer + "mlp.linear_fc1.layer_norm_bias": (2, 16),
        layer + "mlp.linear_fc1.weight": (2, 48, 16),
        layer + "mlp.linear_fc2.weight": (2, 16, 24),
        "decoder.final_layernorm.weight": (16,),
        "decoder.final_layernorm.bias": (16,),
        "output_layer.weight": (64, 16),
    }
    assert {name.removeprefix(states) for name in tensors if name.startswith(states)} == set(
        index.model_tensors()
    )
    chunks = index.tensors[layer + "mlp.linear_fc1.weight"].chunks
    assert len(chunks) == 2 * 2 * tensor_parallel  # layers, gate and up, ranks
    assert any(name.startswith("rng_state/") for name in index.bytes_entries)


def test_checkpoints_of_two_layouts_are_compatible(written):
    one, two = (read_index(resolve(written[size][0])) for size in (1, 2))
    check_compatible(one, {"math": two})
    assert one.num_parameters() == two.num_parameters()
