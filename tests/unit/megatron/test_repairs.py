"""The repair of Megatron's distributed optimizer leaves fused optimizers alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_mergemix.megatron import repairs


class FusedAdam(torch.optim.Optimizer):
    """Keeps one step for all parameters in the group, as Apex and Transformer Engine do."""


def repaired_around(inner: torch.optim.Optimizer) -> tuple[Any, list[Any]]:
    """Return a repaired optimizer around ``inner``, and where its methods note what they got."""
    got: list[Any] = []

    class DistributedOptimizer:
        model_param_group_index_map = {"weight": (0, 0)}
        optimizer = inner

        def state_dict(self) -> list[int]:
            return [len(inner.state)]

        def load_state_dict(self, state: Any) -> None:
            got.append(torch.is_grad_enabled())

        def _set_main_param_and_optimizer_states(self, parameter: str, tensors: Any) -> None:
            got.append(sorted(tensors))

    module = SimpleNamespace(DistributedOptimizer=DistributedOptimizer)
    repairs.REPAIRS["megatron.core.optimizer.distrib_optimizer"](module)
    return DistributedOptimizer(), got


@pytest.mark.parametrize(
    ("kind", "states", "received"),
    [
        (FusedAdam, 0, ["exp_avg"]),
        (torch.optim.Adam, 1, ["exp_avg", "step"]),
        (torch.optim.AdamW, 1, ["exp_avg", "step"]),
    ],
)
def test_only_torch_adam_gets_a_step_per_parameter(
    kind: Any, states: int, received: list[str]
) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    inner = FusedAdam([parameter], {}) if kind is FusedAdam else kind([parameter])
    optimizer, got = repaired_around(inner)
    assert optimizer.state_dict() == [states]  # a step to find, before the first one
    inner.state[parameter] = {"step": torch.tensor(3.0)}
    optimizer._set_main_param_and_optimizer_states("weight", {"exp_avg": torch.zeros(2)})
    optimizer.load_state_dict({})
    assert got == [received, kind is FusedAdam]
    assert inner.state[parameter]["step"] == 3


def test_a_missing_name_in_the_router_is_added_and_a_present_one_kept() -> None:
    repair = repairs.REPAIRS["megatron.core.transformer.moe.moe_utils"]
    without, with_one = SimpleNamespace(), SimpleNamespace(te_general_gemm=max)
    repair(without)
    repair(with_one)
    assert without.te_general_gemm is None
    assert with_one.te_general_gemm is max


def test_the_modules_are_imported_and_repaired_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(repairs, "REPAIRS", {"json": seen.append})
    repairs.apply.cache_clear()
    repairs.apply()
    repairs.apply()
    repairs.apply.cache_clear()
    import json

    assert seen == [json]
