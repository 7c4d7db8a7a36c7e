"""Curvature along task vectors: against automatic differentiation, under every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.test_gradient import KINDS, inputs
from tests.support import bare_gpt
from tests.support.run_distributed import run_distributed

EXPERTS = ("first", "second")
MICRO_BATCH = 2
FOLDER = "iter_0000001"

LAYOUTS = {
    "dense": ("tp2", "tp2, sequence parallel", "pp2", "dp2, in DDP"),
    "moe": ("ep2", "dp2, in DDP", "tp2, MoE experts held twice", "pp2"),
}
"""Of those in ``test_gradient.py``: one for each way in which ranks hold parts of a gradient."""


def expand(home: Path, chunks: Any) -> dict[str, Any]:
    """Return the expansion that is measured, and the sizes of the updates."""
    import torch

    from megatron_mergemix.megatron.curvature import curvature
    from megatron_mergemix.megatron.resident import ResidentProxy

    proxy = ResidentProxy(chunks, home / "base" / FOLDER, {n: home / n / FOLDER for n in EXPERTS})
    before = [tensor.clone() for _, tensor in proxy._live]
    found = vars(curvature(proxy, *inputs(), MICRO_BATCH))
    same = all(torch.equal(a, b) for a, (_, b) in zip(before, proxy._live, strict=True))
    return {**found, "at the base": same, "update sizes": proxy.update_sizes()}


def expand_on_one_rank(home: Path, kind: str) -> dict[str, Any]:
    """Save a base and two bent copies of it, and expand there, also by double backward."""
    chunks = bare_gpt.save_family(home, KINDS[kind][0], EXPERTS)
    found = expand(home, chunks)
    return {**found, **differentiated_twice(home, chunks[0])} if kind == "dense" else found


def differentiated_twice(home: Path, chunk: Any) -> dict[str, Any]:
    """Return gradient and Hessian along the task vectors in float64, from logits alone.

    Megatron's cross entropy saves what it computed, so it cannot be differentiated twice.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from megatron_mergemix.megatron.dist_checkpoint import load_model

    def weights(name: str) -> dict[str, torch.Tensor]:
        load_model(home / name / FOLDER, [chunk])
        return {n: p.detach().double().clone() for n, p in chunk.named_parameters()}

    experts = [weights(name) for name in EXPERTS]
    base = weights("base")
    chunk.double().eval()
    sequences, counted = inputs()
    positions = torch.arange(bare_gpt.LENGTH).expand(len(sequences), -1)

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        arguments = (sequences[:, :-1], positions, None)
        logits = torch.func.functional_call(chunk, values, arguments).transpose(1, 2)
        each = torch.nn.functional.cross_entropy(logits, sequences[:, 1:], reduction="none")
        return (each.sum(dim=1) * counted).sum()

    values = {name: value.requires_grad_() for name, value in base.items()}
    leaves = list(values.values())
    with sdpa_kernel(SDPBackend.MATH):  # the fused one cannot be differentiated twice
        gradients = torch.autograd.grad(loss(values), leaves, create_graph=True)
    vectors = [[expert[name] - base[name].detach() for name in values] for expert in experts]
    products = [
        torch.autograd.grad(gradients, leaves, grad_outputs=vector, retain_graph=True)
        for vector in vectors
    ]

    def inner(a: Any, b: Any) -> float:
        return float(sum((x * y).sum() for x, y in zip(a, b, strict=True)))

    return {
        "exact first order": [inner(gradients, v) for v in vectors],
        "exact second order": [[inner(v, product) for product in products] for v in vectors],
        "exact lengths": [inner(product, product) ** 0.5 for product in products],
    }


def expand_under(home: Path, kind: str) -> dict[str, dict[str, Any]]:
    from megatron.core import parallel_state

    settings, layouts = KINDS[kind]
    found = {}
    for name in LAYOUTS[kind]:
        bare_gpt.start(layouts[name])
        found[name] = expand(home, bare_gpt.build(settings, layouts[name], tied=True))
        parallel_state.destroy_model_parallel()
    return found


@pytest.fixture(scope="module", params=["dense", pytest.param("moe", marks=pytest.mark.nightly)])
def measured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, list[dict[str, Any]]]]:
    """Return the kind of model, and by layout what every rank found."""
    home = tmp_path_factory.mktemp(f"curvature-{request.param}")
    one = run_distributed(expand_on_one_rank, 1, home, request.param)
    ranks = run_distributed(expand_under, 2, home, request.param, timeout=300)
    return request.param, {"one": one, **{n: [rank[n] for rank in ranks] for n in ranks[0]}}


def test_the_expansion_is_that_of_double_backward(measured) -> None:
    kind, found = measured
    (one,) = found["one"]
    if kind == "dense":
        np.testing.assert_allclose(one["first_order"], one["exact first order"], rtol=1e-5)
        exact = np.array(one["exact second order"])
        print("second order", np.abs(one["second_order"] - exact).max() / np.abs(exact).max())
        print("lengths", one["lengths"] / one["exact lengths"] - 1, "steps", one["steps"])
        np.testing.assert_allclose(
            one["second_order"], exact, rtol=0, atol=2e-4 * np.abs(exact).max()
        )
        np.testing.assert_allclose(one["lengths"], one["exact lengths"], rtol=1e-4)
    assert one["disagreements"].max() < 1e-2


def test_the_expansion_does_not_depend_on_the_layout(measured) -> None:
    (one,) = measured[1]["one"]
    largest = np.abs(one["second_order"]).max()
    for layout, ranks in measured[1].items():
        for rank in ranks:
            print(layout, rank["lengths"] / one["lengths"] - 1, rank["disagreements"])
            assert rank["loss"] == pytest.approx(one["loss"], rel=1e-5), layout
            assert rank["first_order"] == pytest.approx(one["first_order"], rel=1e-4), layout
            assert rank["steps"] == pytest.approx(one["steps"], rel=1e-6), layout
            np.testing.assert_allclose(
                rank["second_order"],
                one["second_order"],
                rtol=0,
                atol=1e-3 * largest,
                err_msg=layout,
            )
            assert rank["lengths"] == pytest.approx(one["lengths"], rel=1e-3), layout
            assert rank["update sizes"] == pytest.approx(one["update sizes"], rel=1e-9), layout


def test_the_model_is_left_at_the_base(measured) -> None:
    for layout, ranks in measured[1].items():
        assert all(rank["at the base"] for rank in ranks), layout
