"""GPT chunks made of Megatron Core alone, under layouts that the built-in trainer does not have."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

VOCABULARY, LENGTH = 64, 16

DENSE: Mapping[str, Any] = {"qk_layernorm": True, "add_bias_linear": True}
"""With every kind of parameter that tensor-parallel ranks hold again."""

MOE: Mapping[str, Any] = {
    "add_bias_linear": False,
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 24,
    "moe_shared_expert_intermediate_size": 16,
    "moe_token_dispatcher_type": "alltoall",
    # Smooth in the weights: no token changes its MoE experts between two merges.
    "moe_router_topk": 4,
    # Were they part of the loss that is differentiated, they would change it beyond recognition.
    "moe_aux_loss_coeff": 10.0,
    "moe_z_loss_coeff": 10.0,
}

P2P = {"overlap_p2p_comm": True, "batch_p2p_comm": False}
LAYOUTS: Mapping[str, tuple[int, Mapping[str, Any]]] = {
    "alone": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "dp2": (2, {}),
    "dp2, in DDP": (2, {"ddp": True}),
    "tp2, sequence parallel": (2, {"tensor": 2, "sequence": True}),
    "pp2, virtual stages": (2, {"pipeline": 2, "virtual": 2, "settings": P2P}),
}
"""Name -> ranks, layout: those of one and two ranks in which dense models keep keys, or not."""


def start(layout: Mapping[str, Any]) -> None:
    """Collective: lay out Megatron's groups: tensor, pipeline, virtual, expert, expert_tensor."""
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.get("tensor", 1),
        pipeline_model_parallel_size=layout.get("pipeline", 1),
        virtual_pipeline_model_parallel_size=layout.get("virtual"),
        expert_model_parallel_size=layout.get("expert", 1),
        expert_tensor_parallel_size=layout.get("expert_tensor"),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def build(
    settings: Mapping[str, Any],
    layout: Mapping[str, Any],
    tied: bool,
    model: Mapping[str, Any] | None = None,
) -> list[torch.nn.Module]:
    """Return this rank's chunks in fp32 with dropout, freshly drawn.

    Args:
        settings: fields of Megatron's configuration, on top of a tiny model.
        layout: as for :func:`start`, and ``sequence`` for sequence parallelism and ``ddp`` for
            chunks that are wrapped.
        tied: whether the embedding is the output layer.
        model: arguments of Megatron's model, on top of those of a tiny one.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_model import GPTModel

    chunks: list[torch.nn.Module] = []
    stages = layout.get("virtual") or 1
    for stage in range(stages):
        config = _config(settings, layout)
        virtual = stage if layout.get("virtual") else None
        is_end = {"ignore_virtual": False, "vp_stage": virtual}
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=_spec(config),
            pre_process=parallel_state.is_pipeline_first_stage(**is_end),
            post_process=parallel_state.is_pipeline_last_stage(**is_end),
            share_embeddings_and_output_weights=tied,
            vp_stage=virtual,
            **{
                "vocab_size": VOCABULARY,
                "max_sequence_length": LENGTH,
                "position_embedding_type": "learned_absolute",
                **(model or {}),
            },
        )
        chunk.model_type = getattr(chunk, "model_type", None)
        chunks.append(_wrapped(chunk, config) if layout.get("ddp") else chunk)
    return chunks


def save_family(
    home: Path, settings: Mapping[str, Any], experts: Sequence[str]
) -> list[torch.nn.Module]:
    """Collective: save ``base`` and a bent copy of it per expert, with tied embeddings, under DP.

    Returns:
        The chunks, with the weights of the last expert.
    """
    from megatron_mergemix.megatron.dist_checkpoint import load_model, save

    start({})
    chunks = build(settings, {}, tied=True)
    base = save(home / "base", 1, chunks, training={}, keep=1)
    for number, name in enumerate(experts, start=1):
        load_model(base, chunks)
        with torch.no_grad():
            for parameter in chunks[0].parameters():
                # Elementwise, and not zero where the base is: every parameter takes part.
                parameter += 0.03 * torch.cos(1000 * number * parameter + number)
        save(home / name, 1, chunks, training={}, keep=1)
    return chunks


def _config(settings: Mapping[str, Any], layout: Mapping[str, Any]) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        **{
            "num_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "ffn_hidden_size": 48,
            "init_method_std": 0.1,
            "hidden_dropout": 0.1,
            "attention_dropout": 0.1,
            "params_dtype": torch.float32,
            "pipeline_dtype": torch.float32,
            "use_cpu_initialization": True,
            "tensor_model_parallel_size": layout.get("tensor", 1),
            "pipeline_model_parallel_size": layout.get("pipeline", 1),
            "virtual_pipeline_model_parallel_size": layout.get("virtual"),
            "expert_model_parallel_size": layout.get("expert", 1),
            "expert_tensor_parallel_size": layout.get("expert_tensor"),
            "sequence_parallel": layout.get("sequence", False),
            "gradient_accumulation_fusion": False,
            "persist_layer_norm": False,
            "bias_activation_fusion": False,
            "bias_dropout_fusion": False,
            "masked_softmax_fusion": False,
            **settings,
            **layout.get("settings", {}),
        }
    )


def _spec(config: Any) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    _let_torch_norms_be_sequence_parallel()
    return get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )


def _let_torch_norms_be_sequence_parallel() -> None:
    """Mark their parameters as Apex and Transformer Engine mark theirs; torch's work as well."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    if hasattr(WrappedTorchNorm, "original"):
        return
    original = WrappedTorchNorm.__new__

    def new(cls: Any, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        plain = copy.copy(config)
        plain.sequence_parallel = False
        norm: torch.nn.Module = original(cls, plain, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    WrappedTorchNorm.original, WrappedTorchNorm.__new__ = original, new


def _wrapped(chunk: torch.nn.Module, config: Any) -> torch.nn.Module:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=True, use_distributed_optimizer=True
    )
    wrapped: torch.nn.Module = DistributedDataParallel(config, settings, chunk)
    return wrapped
