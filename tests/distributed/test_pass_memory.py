"""The pass that shows what scoring takes of a GPU: it runs everywhere and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support import bare_gpt
from tests.support.run_distributed import run_distributed

LAYOUTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "tp2": (bare_gpt.DENSE, {"tensor": 2}),
    "pp2, virtual stages": (
        bare_gpt.DENSE,
        {
            "pipeline": 2,
            "virtual": 2,
            "settings": {"overlap_p2p_comm": True, "batch_p2p_comm": False},
        },
    ),
    "dp2, in DDP": (bare_gpt.DENSE, {"ddp": True}),
    "ep2": (bare_gpt.MOE, {"expert": 2}),
}


def run_passes() -> dict[str, Any]:
    """Run both kinds of pass under every layout; return what they saw and what has changed."""
    from megatron.core import parallel_state

    from megatron_mergemix.megatron.dist_checkpoint import unwrap
    from megatron_mergemix.megatron.pass_memory import one_pass

    found = {}
    for name, (settings, layout) in LAYOUTS.items():
        bare_gpt.start(layout)
        chunks = bare_gpt.build(settings, layout, tied=True)
        modules = [unwrap(chunk) for chunk in chunks]  # DDP has gradient buffers of that name
        tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        before = [tensor.clone() for tensor in tensors]
        shapes: list[tuple[int, ...]] = []

        def note(_: torch.nn.Module, args: Any, kept: list[tuple[int, ...]] = shapes) -> None:
            kept.append(tuple(args[0].shape))

        chunks[0].register_forward_pre_hook(note)
        for differentiates in (False, True):
            one_pass(chunks, 3, bare_gpt.LENGTH, differentiates)
        found[name] = {
            "shapes": set(shapes),
            "same": all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True)),
            "gradients": sum(p.grad is not None for chunk in chunks for p in chunk.parameters()),
            "training": all(chunk.training for chunk in chunks),
        }
        parallel_state.destroy_model_parallel()
    return found


def test_a_pass_takes_full_micro_batches_and_leaves_the_model_as_it_was() -> None:
    for rank in run_distributed(run_passes, 2):
        for name, found in rank.items():
            expected = {
                "shapes": {(3, bare_gpt.LENGTH)},
                "same": True,
                "gradients": 0,
                "training": True,
            }
            assert found == expected, name


def test_what_a_pass_takes_is_its_peak_above_what_was_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from megatron_mergemix.megatron import pass_memory

    held, peak = [700], [9000]  # the peak of loading, which the pass must not count

    def reset(device: torch.device) -> None:
        peak[0] = held[0]

    def run() -> None:
        peak[0] = held[0] + 250

    counters: dict[str, Callable[[torch.device], Any]] = {
        "memory_allocated": lambda device: held[0],
        "reset_peak_memory_stats": reset,
        "max_memory_allocated": lambda device: peak[0],
    }
    for name, counter in counters.items():
        monkeypatch.setattr(torch.cuda, name, counter)
    assert pass_memory._peak(torch.device("cuda"), run) == 250
    assert pass_memory._peak(torch.device("cpu"), run) == 0
