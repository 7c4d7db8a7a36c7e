"""Attention in CPU mode: torch's fused kernel where it says the same as Megatron's own code."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import bare_gpt
from tests.support.run_distributed import run_distributed

LENGTH, BATCH, HEADS, WIDTH = 24, 3, 4, 8
SAME = {
    "as many keys as queries": {},
    "groups of queries": {"num_query_groups": 2},
    "a scale of its own": {"softmax_scale": 0.5},
}
OTHER = {
    "dropout": {"attention_dropout": 0.5},
    "a window": {"window_size": (4, 0)},
    "a sink": {"softmax_type": "off-by-one"},
    "scaling by layer": {"apply_query_key_layer_scaling": True},
}


def attention(**settings: Any) -> Any:
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    scale = settings.pop("softmax_scale", None)
    settings = {"attention_dropout": 0.0, "masked_softmax_fusion": False} | settings
    config = TransformerConfig(
        num_layers=2, hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, **settings
    )
    return DotProductAttention(config, 2, AttnMaskType.causal, "self", softmax_scale=scale)


def tensors(groups: int, dtype: Any) -> tuple[Any, Any, Any]:
    import torch

    heads = (HEADS, groups, groups)
    return tuple(
        torch.randn(LENGTH, BATCH, n, WIDTH, dtype=dtype, requires_grad=True) for n in heads
    )


def both_ways(dtype_name: str) -> dict[str, list[tuple[Any, Any]]]:
    """Return output and gradients by the fused kernel, each beside that of Megatron's own code."""
    import torch

    bare_gpt.start({})
    found = {}
    for name, settings in SAME.items():
        layer = attention(**settings)
        own = type(layer).forward.__wrapped__
        given = tensors(settings.get("num_query_groups", HEADS), getattr(torch, dtype_name))
        weights = torch.randn(LENGTH, BATCH, HEADS * WIDTH)
        ways = []
        for forward in (type(layer).forward, own):
            output = forward(layer, *given, None)
            ways.append([output, *torch.autograd.grad((output * weights).sum(), given)])
        found[name] = [
            (a.detach().float().numpy(), b.detach().float().numpy())
            for a, b in zip(*ways, strict=True)
        ]
    return found


@pytest.mark.parametrize(("dtype", "error"), [("float32", 2e-6), ("bfloat16", 4e-2)])
def test_outputs_and_gradients_are_those_of_megatrons_own_code(dtype: str, error: float) -> None:
    (found,) = run_distributed(both_ways, 1, dtype)
    assert found.keys() == SAME.keys()
    for name, pairs in found.items():
        for fused, own in pairs:
            assert fused.shape == own.shape
            assert abs(fused - own).max() < error * max(1.0, abs(own).max()), name


def calls_of_the_kernel() -> dict[str, int]:
    """Return how often each case used the fused kernel."""
    import torch

    bare_gpt.start({})
    kernel, calls = torch.nn.functional.scaled_dot_product_attention, []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return kernel(*args, **options)

    torch.nn.functional.scaled_dot_product_attention = counted
    query, key, value = tensors(HEADS, torch.float32)
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
    plain = attention()
    cases = {
        name: (attention(**changed), (query, key, value, None)) for name, changed in OTHER.items()
    }
    cases |= {
        "plain": (plain, (query, key, value, None)),
        "a kind of mask beside it": (plain, (query, key, value, None, plain.attn_mask_type)),
        "a mask": (plain, (query, key, value, mask)),
        "one token after others": (plain, (query[-1:], key, value, None)),
        "dropout, not in training": (
            attention(attention_dropout=0.5).eval(),
            (query, key, value, None),
        ),
    }
    found = {}
    for name, (layer, given) in cases.items():
        calls.clear()
        layer(*given)
        found[name] = len(calls)
    return found


def test_what_the_kernel_cannot_say_is_left_to_megatron() -> None:
    (found,) = run_distributed(calls_of_the_kernel, 1)
    plain = {"plain", "a kind of mask beside it", "dropout, not in training"}
    assert found == {name: int(name in plain) for name in found}
    assert found.keys() >= OTHER.keys() | plain
