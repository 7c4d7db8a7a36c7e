"""A hybrid stack of attention and MLP layers that needs no TransformerEngine: ``--spec`` names it.

Megatron-LM's own specs of hybrid models are for TransformerEngine, and so is the stack's last norm,
which no spec can replace: importing this module replaces it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)


def _home_of_stack() -> tuple[Any, str]:
    """Return the module and the name of the stack, which 0.18 moved and renamed."""
    try:
        return import_module("megatron.core.models.hybrid.hybrid_block"), "HybridStack"
    except ModuleNotFoundError:
        return import_module("megatron.core.ssm.mamba_block"), "MambaStack"


def _mlp() -> Any:
    submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    if hasattr(MLP, "as_mlp_submodule"):
        from functools import partial

        return partial(MLP.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(module=MLP, submodules=submodules)


_home, _name = _home_of_stack()
_home.TENorm = WrappedTorchNorm

stack_spec = ModuleSpec(
    module=getattr(_home, _name),
    submodules=getattr(_home, f"{_name}Submodules")(
        attention_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=WrappedTorchNorm,
                self_attention=ModuleSpec(
                    module=SelfAttention,
                    params={"attn_mask_type": AttnMaskType.causal},
                    submodules=SelfAttentionSubmodules(
                        linear_qkv=ColumnParallelLinear,
                        core_attention=DotProductAttention,
                        linear_proj=RowParallelLinear,
                    ),
                ),
                self_attn_bda=get_bias_dropout_add,
            ),
        ),
        mlp_layer=ModuleSpec(
            module=MLPLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=WrappedTorchNorm, mlp=_mlp(), mlp_bda=get_bias_dropout_add
            ),
        ),
    ),
)
