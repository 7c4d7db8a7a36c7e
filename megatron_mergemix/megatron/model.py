"""The GPT model of the built-in trainer, made from the ``model`` section of the YAML."""

from __future__ import annotations

import hashlib
import re
import warnings
from typing import Any

import torch

from megatron_mergemix.config import Config, Model, Parallel
from megatron_mergemix.megatron.device import device


def build_model(config: Config, vocab_size: int, seed: int) -> list[torch.nn.Module]:
    """Collective: return this rank's model chunks with freshly initialised weights.

    Args:
        config: the experiment; its ``model`` section must be present.
        vocab_size: of the tokenizer, before padding.
        seed: of the initialisation. In CPU mode the weights do not depend on the tensor-parallel
            and MoE expert-parallel layout; pipeline stages draw from seeds of their own.

    Returns:
        One chunk: the layers of this pipeline stage, cut for this tensor-parallel rank. A model
        in bf16 comes wrapped in Megatron's ``Float16Module``.
    """
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.module import Float16Module

    settings = config.model
    assert settings is not None, "checked when the YAML was loaded"
    # Stages must not draw the same layers; Megatron-LM spaces their seeds like this too.
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed)
    torch.manual_seed(stage_seed)
    transformer = _transformer_config(settings, config.parallel)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chunk: torch.nn.Module = GPTModel(
            config=transformer,
            transformer_layer_spec=_layer_spec(settings),
            vocab_size=settings.padded_vocab(vocab_size),
            max_sequence_length=settings.seq_length,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=settings.tie_embeddings,
            position_embedding_type=settings.position_embedding,
            rotary_base=settings.rotary_base,
        )
    if transformer.use_cpu_initialization and transformer.num_moe_experts is not None:
        _draw_layers_by_name(chunk, transformer, seed)
    chunk.to(device())
    for parameter in chunk.parameters():
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    if settings.precision == "bf16":
        chunk = Float16Module(transformer, chunk)
    return [chunk]


def _draw_layers_by_name(chunk: Any, transformer: Any, seed: int) -> None:
    """Draw every matrix of the layers again, each from a seed of its own.

    Megatron draws on the CPU from one sequence: all expert-parallel ranks would get the same MoE
    experts, and what comes after them would depend on how many they hold.
    """
    from megatron.core import parallel_state

    held = transformer.num_moe_experts // transformer.expert_model_parallel_size
    first = parallel_state.get_expert_model_parallel_rank() * held
    for layer in chunk.decoder.layers:
        for name, parameter in layer.named_parameters():
            if parameter.dim() < 2:
                continue
            name = re.sub(
                r"(?<=local_experts\.)\d+", lambda index: str(first + int(index[0])), name
            )
            is_output = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            draw = transformer.output_layer_init_method if is_output else transformer.init_method
            digest = hashlib.sha256(f"{seed} {layer.layer_number} {name}".encode()).digest()
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(int.from_bytes(digest[:7], "big"))
                parameter.copy_(draw(torch.empty(parameter.shape)))


def _transformer_config(model: Model, parallel: Parallel) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    dtype = torch.bfloat16 if model.precision == "bf16" else torch.float32
    gated = model.activation == "swiglu"
    moe: dict[str, Any] = {}
    if model.num_moe_experts is not None:
        moe = {
            "num_moe_experts": model.num_moe_experts,
            "moe_router_topk": model.moe_top_k,
            "moe_ffn_hidden_size": model.moe_ffn_hidden_size or model.ffn_width(),
            "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
            "moe_router_load_balancing_type": "aux_loss",
            "moe_token_dispatcher_type": "alltoall",
        }
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        ffn_hidden_size=model.ffn_width(),
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=gated,
        activation_func=torch.nn.functional.silu if gated else torch.nn.functional.gelu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=model.precision == "bf16",
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        expert_model_parallel_size=parallel.expert,
        # Drawn whole on the CPU and then cut, weights are the same for every tensor-parallel size.
        use_cpu_initialization=device().type == "cpu",
        # Fused kernels come with apex or Transformer Engine, which are never required.
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        **moe,
    )


def _layer_spec(model: Model) -> Any:
    """Return Transformer Engine layers where they can run, Megatron's own elsewhere."""
    from megatron.core.models.gpt import gpt_layer_specs

    # megatron-core spells one argument set for both kinds of layers.
    arguments = {"num_experts": model.num_moe_experts, "moe_grouped_gemm": False}
    if device().type == "cuda" and getattr(gpt_layer_specs, "HAVE_TE", False):
        return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(**arguments)
    return gpt_layer_specs.get_gpt_layer_local_spec(normalization=model.normalization, **arguments)
