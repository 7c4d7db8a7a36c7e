"""Where Megatron Core goes wrong without Apex and Transformer Engine, on any device."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any


@functools.cache
def apply() -> None:
    """Import and repair what needs it; a second call does nothing.

    CPU mode repairs the same modules when they are imported, and does not need this.
    """
    for name, repair in REPAIRS.items():
        repair(importlib.import_module(name))


def _repair_router_gating(moe_utils: Any) -> None:
    # Megatron Core 0.16 reads this name, but defines it only where Transformer Engine is present.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _repair_distributed_optimizer(distrib_optimizer: Any) -> None:
    """Let the distributed optimizer resume with torch's Adam, which stands in for a fused one.

    Megatron expects that step counts live in parameter groups. Torch's live in the states: there
    is none before the first step; loading then sets them back, misses them or, since all states
    get one and the same tensor, would count every parameter as a step. And the fp32 weights are
    copied into views that autograd guards. With a fused Adam nothing changes.
    """
    import torch

    wrapped = distrib_optimizer.DistributedOptimizer
    original_state_dict, original_load = wrapped.state_dict, wrapped.load_state_dict
    original_set = wrapped._set_main_param_and_optimizer_states

    def has_torch_adam(self: Any) -> bool:
        return isinstance(self.optimizer, (torch.optim.Adam, torch.optim.AdamW))

    def state_dict(self: Any) -> Any:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if not has_torch_adam(self) or self.optimizer.state or not parameters:
            return original_state_dict(self)
        self.optimizer.state[parameters[0]] = {"step": torch.tensor(0.0)}
        try:
            return original_state_dict(self)
        finally:
            self.optimizer.state.clear()

    def set_states(self: Any, model_parameter: Any, tensors: Any) -> None:
        if has_torch_adam(self):
            group, place = self.model_param_group_index_map[model_parameter]
            state = self.optimizer.state[self.optimizer.param_groups[group]["params"][place]]
            tensors = {**tensors, "step": state["step"]} if "step" in state else tensors
        original_set(self, model_parameter, tensors)

    def load_state_dict(self: Any, state_dict: Any) -> None:
        if not has_torch_adam(self):
            original_load(self, state_dict)
            return
        with torch.no_grad():
            original_load(self, state_dict)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    wrapped.state_dict, wrapped.load_state_dict = state_dict, load_state_dict
    wrapped._set_main_param_and_optimizer_states = set_states


REPAIRS: dict[str, Callable[[Any], None]] = {
    "megatron.core.transformer.moe.moe_utils": _repair_router_gating,
    "megatron.core.optimizer.distrib_optimizer": _repair_distributed_optimizer,
}
