"""Parameters that live in the buffers of Megatron's DDP, as in a launch of Megatron-LM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.support import bare_gpt
from tests.support.run_distributed import run_distributed

ALPHAS = [{"first": 0.9, "second": 0.4}, {"first": -0.2, "second": 0.7}]
"""What either replica is merged to, at the same time."""


def apart_in_buffers(home: Path) -> dict[str, Any]:
    """Merge both replicas to candidates of their own; return what stands in the buffers then."""
    import torch
    from megatron.core import parallel_state

    from megatron_mergemix.checkpoint.saves import resolve
    from megatron_mergemix.megatron.replicas import Replicas
    from megatron_mergemix.megatron.resident import ResidentProxy
    from megatron_mergemix.processes.distributed import rank

    plain = bare_gpt.save_family(home, bare_gpt.DENSE, list(ALPHAS[0]))
    base = resolve(home / "base")
    experts = {name: resolve(home / name) for name in ALPHAS[0]}
    sequences = torch.randint(0, bare_gpt.VOCABULARY, (5, bare_gpt.LENGTH + 1))
    torch.distributed.broadcast(sequences, 0)

    expected = []
    proxy = ResidentProxy(plain, base, experts)
    for alpha in ALPHAS:
        proxy.apply(alpha)
        weights = {name: tensor.numpy().copy() for name, tensor in proxy._live}
        expected.append((weights, proxy.sequence_losses(sequences, 2).tolist()))

    wrapped = bare_gpt.build(bare_gpt.DENSE, {"ddp": True}, tied=True)
    replicas = Replicas()
    proxy = ResidentProxy(wrapped, base, experts, replicas=replicas)
    buffers = [buffer.param_data for buffer in wrapped[0].buffers]
    inside = [_holds(buffers, tensor) for _, tensor in proxy._live]
    covered = _covered(buffers, [tensor for _, tensor in proxy._live])
    for buffer, mask in zip(buffers, covered, strict=True):
        buffer[~mask] = 7.0  # what pads the buffer out belongs to nobody
    with replicas.apart():
        proxy.apply(ALPHAS[rank()])
        losses = proxy.sequence_losses(sequences, 2).tolist()
    found = {name: tensor.numpy().copy() for name, tensor in proxy._live}
    padding = all(
        bool((buffer[~mask] == 7.0).all()) for buffer, mask in zip(buffers, covered, strict=True)
    )
    parallel_state.destroy_model_parallel()
    return {
        "expected": expected[rank()],
        "found": (found, losses),
        "inside": all(inside),
        "padded": sum(int((~mask).sum()) for mask in covered),
        "padding": padding,
    }


def _holds(buffers: list[Any], tensor: Any) -> bool:
    address = tensor.untyped_storage().data_ptr()
    return any(buffer.untyped_storage().data_ptr() == address for buffer in buffers)


def _covered(buffers: list[Any], tensors: list[Any]) -> list[Any]:
    """Return for every buffer which of its elements belong to a tensor."""
    import torch

    masks = [torch.zeros(buffer.numel(), dtype=torch.bool) for buffer in buffers]
    for tensor in tensors:
        for buffer, mask in zip(buffers, masks, strict=True):
            start = (tensor.data_ptr() - buffer.data_ptr()) // buffer.element_size()
            if 0 <= start < buffer.numel():
                mask[start : start + tensor.numel()] = True
    return masks


def test_two_replicas_hold_different_candidates_in_the_buffers_of_ddp(tmp_path: Path) -> None:
    for rank in run_distributed(apart_in_buffers, 2, tmp_path):
        assert rank["inside"], "every parameter stays where DDP put it"
        assert rank["padded"] > 0
        assert rank["padding"], "and nothing else in the buffers is written"
        weights, losses = rank["expected"]
        found, own = rank["found"]
        assert own == losses
        assert found.keys() == weights.keys()
        for name, value in weights.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)


def on_virtual_stages(home: Path) -> dict[str, Any]:
    """Merge interleaved stages in DDP; return weights of candidates and of checkpoints alone."""
    from megatron.core import parallel_state

    from megatron_mergemix.checkpoint.saves import resolve
    from megatron_mergemix.megatron.dist_checkpoint import load_model
    from megatron_mergemix.megatron.resident import ResidentProxy

    bare_gpt.save_family(home, bare_gpt.DENSE, list(ALPHAS[0]))
    parallel_state.destroy_model_parallel()
    layout = {"pipeline": 2, "virtual": 2, "ddp": True}
    bare_gpt.start(layout)
    chunks = bare_gpt.build(bare_gpt.DENSE, layout, tied=True)
    paths = {name: resolve(home / name) for name in ("base", *ALPHAS[0])}
    experts = {name: path for name, path in paths.items() if name != "base"}
    proxy = ResidentProxy(chunks, paths["base"], experts)
    addresses = [tensor.data_ptr() for _, tensor in proxy._live]

    def weights() -> dict[str, Any]:
        return {name: tensor.numpy().copy() for name, tensor in proxy._live}

    merged = {}
    for name, alpha in {"other": ALPHAS[0], "first": {"first": 1.0}, "base": {}}.items():
        proxy.apply(alpha)
        merged[name] = weights()
    loaded = {}
    for name, path in paths.items():
        load_model(path, chunks)
        loaded[name] = weights()
    parallel_state.destroy_model_parallel()
    return {
        "merged": merged,
        "loaded": loaded,
        "stays": addresses == [tensor.data_ptr() for _, tensor in proxy._live],
    }


def test_base_and_expert_come_back_bit_for_bit_in_every_virtual_stage(tmp_path: Path) -> None:
    first, last = run_distributed(on_virtual_stages, 2, tmp_path)
    for found in (first, last):
        assert found["stays"]
        merged, loaded = found["merged"], found["loaded"]
        assert {tensor.partition(".")[0] for tensor in merged["base"]} == {"0", "1"}
        for name in ("base", "first"):
            assert merged[name].keys() == loaded[name].keys()
            for tensor, value in merged[name].items():
                np.testing.assert_array_equal(value, loaded[name][tensor], err_msg=tensor)
                assert not np.array_equal(value, merged["other"][tensor]), "each takes part"
    np.testing.assert_array_equal(  # tied, and so a copy on either end
        first["merged"]["other"]["0.embedding.word_embeddings.weight"],
        last["merged"]["other"]["1.output_layer.weight"],
    )
