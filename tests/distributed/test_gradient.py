"""The gradient in the merge weights: against differences of the loss, under every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import bare_gpt
from tests.support.run_distributed import run_distributed

ALPHA = {"first": 0.9, "second": 0.4}
"""Merge weights at which everything is measured: an affine merge, where the base weighs -0.3."""

NUM, MICRO_BATCH = 7, 2
"""Over two data ranks there are three padded sequences, over virtual stages more."""

STEP = 0.05
"""Of the differences, in merge weights."""

DENSE = {
    "tp2": {"tensor": 2},
    "tp2, sequence parallel": {"tensor": 2, "sequence": True},
    "pp2": {"pipeline": 2},
    "pp2, virtual stages": {
        "pipeline": 2,
        "virtual": 2,
        # Megatron-LM sets both; else two stages would mix up what they send each other.
        "settings": {"overlap_p2p_comm": True, "batch_p2p_comm": False},
    },
    "dp2": {},
    "dp2, in DDP": {"ddp": True},
    "tp2, recomputed": {
        "tensor": 2,
        "settings": {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    },
}
MOE = {
    "ep2": {"expert": 2},
    "ep2, in DDP": {"expert": 2, "ddp": True},
    "dp2, in DDP": {"ddp": True},
    "tp2, MoE experts cut": {"tensor": 2, "sequence": True, "expert_tensor": 2},
    "tp2 ep2, MoE experts whole": {
        "tensor": 2,
        "sequence": True,
        "expert": 2,
        "expert_tensor": 1,
    },
    "tp2, MoE experts held twice": {"tensor": 2, "sequence": True, "expert_tensor": 1},
    "pp2": {"pipeline": 2},
}
KINDS = {"dense": (bare_gpt.DENSE, DENSE), "moe": (bare_gpt.MOE, MOE)}


def inputs() -> tuple[Any, Any]:
    """Return sequences and weights: uneven ones, and one sequence that does not count."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (NUM, bare_gpt.LENGTH + 1)
    sequences = torch.randint(0, bare_gpt.VOCABULARY, shape, generator=generator)
    weights = torch.rand(NUM, generator=generator, dtype=torch.float64) / bare_gpt.LENGTH
    weights[2] = 0.0
    return sequences, weights


def make_checkpoints(home: Path, kind: str) -> dict[str, Any]:
    """Write a base and two bent copies of it on one rank, and differentiate there."""
    return differentiated(home, bare_gpt.save_family(home, KINDS[kind][0], list(ALPHA)))


def differentiated(home: Path, chunks: Any) -> dict[str, Any]:
    """Return the gradient, the losses beside it, central differences, and what is left behind."""
    import torch
    from megatron.core.utils import get_model_config

    from megatron_mergemix.megatron.resident import ResidentProxy

    folder = "iter_0000001"
    proxy = ResidentProxy(
        chunks, home / "base" / folder, {name: home / name / folder for name in ALPHA}
    )
    sequences, weights = inputs()

    def loss(alpha: dict[str, float]) -> float:
        proxy.apply(alpha)
        return float(weights @ proxy.sequence_losses(sequences, MICRO_BATCH))

    def difference(name: str) -> float:
        """Of fourth order."""
        near, far = (
            loss({**ALPHA, name: ALPHA[name] + s * STEP})
            - loss({**ALPHA, name: ALPHA[name] - s * STEP})
            for s in (1, 2)
        )
        return (8 * near - far) / (12 * STEP)

    differences = {name: difference(name) for name in ALPHA}
    proxy.apply(ALPHA)
    config = get_model_config(chunks[0])
    config.finalize_model_grads_func = forbidden
    modules = [module for chunk in chunks for module in chunk.modules()]
    for number, module in enumerate(modules):
        module.training = number % 3 > 0
    before = {name: tensor.clone() for name, tensor in proxy._live}
    addresses = [tensor.data_ptr() for _, tensor in proxy._live]
    losses, gradient = proxy.loss_gradient(sequences, weights, MICRO_BATCH)
    again = proxy.loss_gradient(sequences, weights, MICRO_BATCH)[1]
    kept = {
        "weights": all(torch.equal(before[name], tensor) for name, tensor in proxy._live),
        "storage": [tensor.data_ptr() for _, tensor in proxy._live] == addresses,
        "modes": [module.training for module in modules]
        == [n % 3 > 0 for n in range(len(modules))],
        "configuration": config.finalize_model_grads_func is forbidden,
        "no gradient": not any(left_behind(p) for chunk in chunks for p in chunk.parameters()),
        "the same again": again == gradient,
    }
    return {
        "gradient": gradient,
        "differences": differences,
        "losses": losses.tolist(),
        "scored": proxy.sequence_losses(sequences, MICRO_BATCH).tolist(),
        "kept": kept,
    }


def forbidden(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("no gradient is reduced over ranks")


def left_behind(parameter: Any) -> bool:
    main = getattr(parameter, "main_grad", None)
    return parameter.grad is not None or (main is not None and bool(main.any()))


def differentiate_under(home: Path, kind: str) -> dict[str, dict[str, Any]]:
    from megatron.core import parallel_state

    settings, layouts = KINDS[kind]
    found = {}
    for name, layout in layouts.items():
        bare_gpt.start(layout)
        found[name] = differentiated(home, bare_gpt.build(settings, layout, tied=True))
        parallel_state.destroy_model_parallel()
    return found


@pytest.fixture(scope="module", params=KINDS)
def measured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """Return by layout what every rank found."""
    home = tmp_path_factory.mktemp(f"gradient-{request.param}")
    one = run_distributed(make_checkpoints, 1, home, request.param)
    ranks = run_distributed(differentiate_under, 2, home, request.param, timeout=300)
    return {"one": one, **{name: [rank[name] for rank in ranks] for name in ranks[0]}}


def test_the_gradient_is_that_of_the_loss_under_every_layout(measured) -> None:
    for layout, ranks in measured.items():
        for name, expected in ranks[0]["differences"].items():
            found = ranks[0]["gradient"][name]
            print(f"{layout:30s} {name:7s} {found:+.7f} differences {expected:+.7f}")
            assert abs(expected) > 1e-2, "too flat to tell"
            assert found == pytest.approx(expected, rel=1e-3), layout


def test_the_gradient_does_not_depend_on_the_layout(measured) -> None:
    for layout, ranks in measured.items():
        for rank in ranks:
            assert rank["gradient"] == ranks[0]["gradient"], f"{layout}: ranks differ"
            assert rank["gradient"] == pytest.approx(measured["one"][0]["gradient"], rel=1e-4), (
                layout
            )


def test_the_losses_beside_the_gradient_are_those_of_scoring(measured) -> None:
    for layout, ranks in measured.items():
        for rank in ranks:
            np.testing.assert_allclose(rank["losses"], rank["scored"], rtol=2e-6, err_msg=layout)
            np.testing.assert_allclose(rank["losses"], measured["one"][0]["scored"], rtol=1e-5)


def test_the_model_is_left_as_it_was(measured) -> None:
    for layout, ranks in measured.items():
        for rank in ranks:
            assert rank["kept"] == dict.fromkeys(rank["kept"], True), layout


WRONG = {
    "frozen": "1 parameters are frozen (embedding.word_embeddings.weight)",
    "moe": "needs --sequence-parallel",
    "graphs": "CUDA graphs",
    "fp16": "small gradients vanish",
    "delayed": "--delay-wgrad-compute",
    "other wrapper": "wrapped in Sequential",
}


def refusals() -> dict[str, str]:
    """Return by mode why a model in it is not differentiated; right ones have no reason."""
    import torch
    from megatron.core.utils import get_model_config

    bare_gpt.start({})
    found = {"ddp": refusal_of(bare_gpt.build(bare_gpt.DENSE, {"ddp": True}, tied=True))}
    for wrong in WRONG:
        settings = bare_gpt.MOE if wrong == "moe" else bare_gpt.DENSE
        chunks = bare_gpt.build(settings, {}, tied=False)
        found[f"before {wrong}"] = refusal_of(chunks)
        config = get_model_config(chunks[0])
        if wrong == "frozen":
            next(chunks[0].parameters()).requires_grad = False
        elif wrong == "moe":
            config.tensor_model_parallel_size = 2
        elif wrong == "graphs":
            config.cuda_graph_impl = "local"
        elif wrong == "fp16":
            config.fp16 = True
        elif wrong == "delayed":
            config.delay_wgrad_compute = True
        else:
            chunks = [torch.nn.Sequential(chunks[0])]
            chunks[0].config = config
        found[wrong] = refusal_of(chunks)
    return found


def refusal_of(chunks: Any) -> str:
    from megatron_mergemix.errors import ConfigError
    from megatron_mergemix.megatron.gradient import check_differentiable

    try:
        check_differentiable(chunks)
    except ConfigError as error:
        return str(error)
    return ""


def test_modes_without_a_right_backward_pass_are_refused() -> None:
    (found,) = run_distributed(refusals, 1)
    for wrong, text in WRONG.items():
        assert text in found.pop(wrong)
    assert len(found) == 1 + len(WRONG)
    assert not any(found.values())
