"""The few spots where Megatron itself relies on CUDA, Apex or TransformerEngine, for CPU mode."""

from __future__ import annotations

from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class Repairer(MetaPathFinder):
    """Repairs the few modules of Megatron that rely on CUDA or TransformerEngine, when imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Find a module that needs repair where it would be found anyway."""
        repair = REPAIRS.get(name)
        spec = PathFinder.find_spec(name, path, target) if repair else None
        if repair is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_repair(module: ModuleType) -> None:
            execute(module)
            repair(module)

        spec.loader.exec_module = execute_and_repair  # type: ignore[method-assign]
        return spec


def _repair_router_gating(moe_utils: Any) -> None:
    # Megatron Core 0.16 reads this name, but defines it only where TransformerEngine is present.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _repair_fused_kernels(fused_kernels: Any) -> None:
    # Megatron-LM 0.16 asks nvcc for its version here, and then builds nothing.
    fused_kernels.load = lambda args: None


def _repair_distributed_optimizer(distrib_optimizer: Any) -> None:
    """Let the distributed optimizer resume with torch's Adam, which has to replace the fused one.

    Megatron expects that step counts live in parameter groups. Torch's live in the states: there
    is none before the first step; loading then sets them back, misses them or, since all states
    get one and the same tensor, would count every parameter as a step. And the fp32 weights are
    copied into views that autograd guards.
    """
    import torch

    wrapped = distrib_optimizer.DistributedOptimizer
    original_state_dict, original_load = wrapped.state_dict, wrapped.load_state_dict
    original_set = wrapped._set_main_param_and_optimizer_states

    def state_dict(self: Any) -> Any:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.optimizer.state or not parameters:
            return original_state_dict(self)
        self.optimizer.state[parameters[0]] = {"step": torch.tensor(0.0)}
        try:
            return original_state_dict(self)
        finally:
            self.optimizer.state.clear()

    def set_states(self: Any, model_parameter: Any, tensors: Any) -> None:
        group, place = self.model_param_group_index_map[model_parameter]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][place]]
        step_as_it_is = {"step": state["step"]} if "step" in state else {}
        original_set(self, model_parameter, {**tensors, **step_as_it_is})

    def load_state_dict(self: Any, state_dict: Any) -> None:
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
    "megatron.legacy.fused_kernels": _repair_fused_kernels,
}
