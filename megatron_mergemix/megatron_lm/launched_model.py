"""What the arguments of a launch say about the model, as the digests of an experiment need it."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from megatron_mergemix.config import Config, ModelFacts
from megatron_mergemix.errors import ConfigError
from megatron_mergemix.model_facts import as_json

_SCORING = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels"),
    *("group_query_attention", "num_query_groups", "normalization", "norm_epsilon"),
    *("apply_layernorm_1p", "swiglu", "squared_relu", "quick_geglu", "openai_gelu"),
    *("add_bias_linear", "add_qkv_bias", "qk_layernorm", "qk_l2_norm", "softmax_type"),
    *("position_embedding_type", "rotary_base", "rotary_percent", "rotary_interleaved"),
    *("rotary_seq_len_interpolation_factor", "use_rope_scaling", "rope_scaling_factor"),
    *("no_rope_freq", "window_size", "window_attn_skip_freq", "max_position_embeddings"),
    *("untie_embeddings_and_output_weights",),
    *("multi_latent_attention", "q_lora_rank", "kv_lora_rank", "qk_head_dim"),
    *("qk_pos_emb_head_dim", "v_head_dim", "rotary_scaling_factor", "mscale", "mscale_all_dim"),
    *("num_experts", "moe_layer_freq", "moe_ffn_hidden_size", "moe_router_topk"),
    *("moe_shared_expert_intermediate_size", "moe_router_score_function"),
    *("moe_router_pre_softmax", "moe_router_topk_scaling_factor", "moe_router_num_groups"),
    *("moe_router_group_topk", "moe_router_enable_expert_bias"),
    *("spec", "hybrid_override_pattern", "hybrid_layer_pattern", "hybrid_attention_ratio"),
    *("hybrid_mlp_ratio", "is_hybrid_model", "mamba_state_dim", "mamba_head_dim"),
    *("mamba_num_groups", "mamba_num_heads", "mtp_num_layers", "linear_attention_freq"),
    *("use_mup", "mup_base_hidden_size", "mup_embedding_mult", "mup_output_mult"),
    *("mup_base_head_dim", "mup_attn_scale_power"),
    *("heterogeneous_layers_config_path", "tokenizer_type", "tokenizer_model", "vocab_size"),
    *("bf16", "fp16"),
)
"""Arguments that decide what a checkpoint computes. The padding of the vocabulary, which depends on
the parallel layout, is compared with the base when the model is built."""

_TRAINING = (
    *("optimizer", "adam_beta1", "adam_beta2", "adam_eps", "muon_momentum", "clip_grad"),
    *("weight_decay", "start_weight_decay", "end_weight_decay", "weight_decay_incr_style"),
    *("attention_dropout", "hidden_dropout", "moe_aux_loss_coeff", "moe_z_loss_coeff"),
    *("moe_router_load_balancing_type", "moe_router_bias_update_rate", "moe_input_jitter_eps"),
    *("moe_expert_capacity_factor",),
    *("mtp_loss_scaling_factor", "reset_position_ids", "reset_attention_mask", "eod_mask_loss"),
    *("fp8", "fp4", "accumulate_allreduce_grads_in_fp32", "decoupled_lr", "save_interval"),
)
"""Further arguments that decide what training makes of it. Learning rate, steps, data and seeds
are the experiment's; the parallel layout decides nothing."""


def with_launched_model(config: Config, args: argparse.Namespace) -> Config:
    """Return the settings with the model that a launch describes.

    Args:
        config: the experiment.
        args: before Megatron-LM validates them, with those of ``--use-checkpoint-args`` filled in.

    Raises:
        ConfigError: the sequence length or the batch size is missing.
    """
    if args.seq_length is None:
        raise ConfigError("--seq-length is missing: steps and held-out windows are counted in it.")
    scoring = _named(args, _SCORING)
    training = {**_named(args, _TRAINING), "global_batch_size": global_batch_size(args)}
    if training.get("save_interval") is None:  # the stage then sets that of the settings
        training["save_interval"] = config.training.save_interval
    if args.num_experts is not None:
        training["micro_batch_size"] = args.micro_batch_size  # load is balanced within one
    launched = ModelFacts(
        seq_length=args.seq_length,
        global_batch_size=global_batch_size(args),
        scoring=scoring,
        training={
            "model": {**scoring, "seq_length": args.seq_length},
            "training": training,
        },
    )
    return config.model_copy(update={"launched": launched})


def global_batch_size(args: argparse.Namespace) -> int:
    """Return the sequences per step; without the flag Megatron-LM takes one micro-batch per rank.

    Raises:
        ConfigError: there is no micro-batch size either.
    """
    if args.global_batch_size is not None:
        return int(args.global_batch_size)
    if args.micro_batch_size is None:
        raise ConfigError("--micro-batch-size is missing: tokens per step follow from it.")
    cut = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    cut *= args.context_parallel_size
    return int(args.micro_batch_size) * max(1, args.world_size // cut)


def check_same_model(before: Config, now: Config) -> None:
    """Check that a launch describes the model that an earlier one put on record.

    Raises:
        ConfigError: an argument that decides scores differs; names them.
    """
    if before.launched is None or now.launched is None:
        return
    old, new = before.launched.scoring, now.launched.scoring
    old = {**old, "seq_length": before.launched.seq_length}
    new = {**new, "seq_length": now.launched.seq_length}
    differing = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if differing:
        what = ", ".join(
            f"--{name.replace('_', '-')}: {old.get(name)} -> {new.get(name)}" for name in differing
        )
        raise ConfigError(
            f"this launch describes another model than the earlier ones of this run_dir: {what}. "
            "All stages but train must describe the model that the experts have. Mend the launch, "
            "or use another run_dir."
        )


def _named(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Return the arguments that are set, by name; versions differ in which there are."""
    found = {name: getattr(args, name, None) for name in names}
    return {name: as_json(value) for name, value in found.items() if value not in (None, False)}
