"""Does a checkpoint hold the model that is live? Names, shapes, dtypes and what none of them show.

Megatron loads what it is asked for and leaves the rest. A checkpoint of another architecture would
load without a word, and every score after that would be wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch.nn import functional

from megatron_mergemix.checkpoint.checks import check_intact
from megatron_mergemix.checkpoint.common_state import arguments, read_common
from megatron_mergemix.checkpoint.index import CheckpointIndex, TensorEntry
from megatron_mergemix.checkpoint.metadata import read_index
from megatron_mergemix.errors import CheckpointError
from megatron_mergemix.processes.distributed import from_all, together

ARCHITECTURE = "mergemix_model"
"""Entry of the common state that holds what :func:`architecture` returned when it was saved."""

_SETTINGS = {
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_query_groups",
    "normalization": "normalization",
    "norm_epsilon": "norm_epsilon",
    "layernorm_epsilon": "norm_epsilon",
    "position_embedding_type": "position_embedding",
    "rotary_base": "rotary_base",
    "moe_router_topk": "moe_top_k",
}
"""Argument of pretrain_gpt.py -> setting of the model section."""

_PRECISION = {"float32": "fp32", "bfloat16": "bf16"}


def architecture(module: Any) -> dict[str, Any]:
    """Return what the tensors of a Megatron GPT or hybrid model do not show, by setting."""
    config = module.config
    shown: dict[str, Any] = {
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_query_groups,
        "normalization": config.normalization,
        "norm_epsilon": config.layernorm_epsilon,
        "position_embedding": module.position_embedding_type,
        "activation": _activation(config),
    }
    if module.position_embedding_type == "rope" and hasattr(module, "rotary_base"):  # no hybrid has
        shown["rotary_base"] = module.rotary_base
    if config.num_moe_experts is not None:
        shown["moe_top_k"] = config.moe_router_topk
    return shown


def _activation(config: Any) -> str:
    from megatron.core.activations import squared_relu

    if config.gated_linear_unit:
        return "swiglu" if config.activation_func is functional.silu else "quick-geglu"
    return "squared-relu" if config.activation_func is squared_relu else "gelu"


def check_fits(path: Path, state: Mapping[str, Any], live: Mapping[str, Any]) -> None:
    """Collective: check that a checkpoint has the tensors of the live model, and no others.

    Args:
        path: the iteration's folder.
        state: sharded state of this rank's model chunks, by chunk.
        live: :func:`architecture` of the model.

    Raises:
        CheckpointError: a file is missing or cut off, or names, shapes, dtypes or architecture
            differ. The architecture of a checkpoint that does not tell it is not compared.
    """
    wanted = _requested(state)
    everywhere = _on_any_rank(tensor.key for tensor in wanted)
    with together():
        index = read_index(path)
        check_intact(index)
        stored = index.model_tensors()
        told = _told(index)
        problems = [
            f"model.{setting} is {value}, the checkpoint was saved with {told[setting]}"
            for setting, value in live.items()
            if setting in told and told[setting] != value
        ]
        problems += _shape_problems(wanted, stored)
        problems += [
            f"{key} is in the checkpoint only" for key in stored if key not in everywhere
        ] + _dtype_problems(wanted, stored)
        _refuse(path, problems)


def _told(index: CheckpointIndex) -> dict[str, Any]:
    """Return the settings that the common state tells, ours or the arguments of pretrain_gpt.py."""
    common = read_common(index)
    if isinstance(ours := common.get(ARCHITECTURE), dict):
        return ours
    args = arguments(common)
    told = {setting: args[name] for name, setting in _SETTINGS.items() if name in args}
    if "group_query_attention" in args and not args["group_query_attention"]:
        told["num_query_groups"] = told.get("num_attention_heads")
    if "swiglu" in args:
        flags = (name for name in ("swiglu", "squared_relu", "quick_geglu") if args.get(name))
        told["activation"] = next(flags, "gelu").replace("_", "-")
    # A value that is no plain one cannot be compared.
    return {key: value for key, value in told.items() if isinstance(value, (int, float, str))}


def _requested(state: Mapping[str, Any]) -> list[Any]:
    """Return the tensors that this rank asks the checkpoint for."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    probe = {name: dict(chunk) for name, chunk in state.items()}
    apply_factories(probe)
    return [value for value in nested_values(probe) if isinstance(value, ShardedTensor)]


def _on_any_rank(keys: Iterable[str]) -> set[str]:
    """Collective: return the union; pipeline stages and expert ranks ask for different names."""
    return set().union(*from_all(set(keys)))


def _shape_problems(wanted: Iterable[Any], stored: Mapping[str, TensorEntry]) -> list[str]:
    problems = []
    for tensor in wanted:
        shape = tuple(tensor.global_shape)
        if tensor.key not in stored:
            problems.append(f"{tensor.key} is missing")
        elif tuple(stored[tensor.key].shape) != shape and not tensor.allow_shape_mismatch:
            problems.append(f"{tensor.key} is {stored[tensor.key].shape}, the model has {shape}")
        elif tensor.allow_shape_mismatch and stored[tensor.key].shape[0] != shape[0]:
            problems.append(
                f"{tensor.key} has {stored[tensor.key].shape[0]} vocabulary rows, the model "
                f"{shape[0]}: set model.make_vocab_size_divisible_by as the checkpoint had it"
            )
    return problems


def _dtype_problems(wanted: Iterable[Any], stored: Mapping[str, TensorEntry]) -> list[str]:
    """Return one problem per pair of dtypes: converted weights would not be what was saved."""
    keys: dict[tuple[str, str], list[str]] = {}
    for tensor in wanted:
        if tensor.key in stored:
            pair = (stored[tensor.key].dtype, str(tensor.dtype).removeprefix("torch."))
            if pair[0] != pair[1]:
                keys.setdefault(pair, []).append(tensor.key)
    problems = []
    for (theirs, ours), named in keys.items():
        advice = (
            f"set model.precision to {_PRECISION[theirs]}"
            if theirs in _PRECISION
            else "convert the checkpoint to float32 or bfloat16"
        )
        problems.append(
            f"{len(set(named))} tensors such as {named[0]} are {theirs}, the model has {ours}: "
            f"{advice}"
        )
    return problems


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"checkpoint {path} does not fit the model: {'; '.join(problems[:5])}{more}. "
            "The model section must describe the model that was saved."
        )
