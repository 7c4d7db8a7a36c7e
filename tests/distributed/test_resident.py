"""The resident proxy on real ranks: exact at the corners, right in between, under any layout."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.support.run_distributed import RankFailure, run_distributed
from tests.support.weights import read_weights

LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)]
"""tensor, pipeline, data"""


def start(config_path: Path, layout: tuple[int, int, int]):
    """Start the ranks and return the configuration and fresh model chunks."""
    from megatron_mergemix.config import load_config
    from megatron_mergemix.megatron import parallel
    from megatron_mergemix.megatron.model import build_model
    from megatron_mergemix.model_facts import vocab_size

    tensor, pipeline, data = layout
    config = load_config(
        config_path,
        [
            f"parallel.processes={tensor * pipeline * data}",
            f"parallel.tensor={tensor}",
            f"parallel.pipeline={pipeline}",
        ],
    )
    parallel.start(config.parallel)
    return config, build_model(config, vocab_size(config), seed=99)


def weights_of(proxy) -> dict[str, np.ndarray]:
    return {name: tensor.float().numpy().copy() for name, tensor in proxy._live}


def corners_and_middle(config_path: Path, layout: tuple[int, int, int]):
    """Apply a series of candidates; return this rank's weights after each."""
    import torch

    from megatron_mergemix.megatron.dist_checkpoint import load_model
    from megatron_mergemix.megatron.resident import ResidentProxy
    from megatron_mergemix.training_runs.experiment_runs import base_checkpoint, expert_checkpoints

    config, chunks = start(config_path, layout)
    base, experts = base_checkpoint(config), expert_checkpoints(config)
    proxy = ResidentProxy(chunks, base, experts, "file" if layout == (2, 1, 1) else "auto")
    addresses = [tensor.data_ptr() for _, tensor in proxy._live]
    seen = {"base": weights_of(proxy)}
    norms = {}
    for name, alpha in {
        "middle": {"math": 0.7, "code": 0.5, "prose": -0.2},
        "math": {"math": 1.0},
        "uniform": dict.fromkeys(experts, 1 / 3),
        "half way": {"code": 0.5},
        "base again": {},
    }.items():
        norms[name] = proxy.apply(alpha)
        seen[name] = weights_of(proxy)
    assert [tensor.data_ptr() for _, tensor in proxy._live] == addresses
    sequences = torch.randint(0, 257, (7, 33), generator=torch.Generator().manual_seed(0))
    proxy.apply({"math": 0.7, "code": 0.5, "prose": -0.2})
    losses = proxy.sequence_losses(sequences, micro_batch_size=2).tolist()
    loaded = {}
    for name, path in {"base": base, **experts}.items():
        load_model(path, chunks)
        loaded[name] = weights_of(proxy)
    return seen, loaded, norms, losses


def tried_by_triton(failing: set[int]) -> bool:
    """Return whether this rank merges by Triton, where some ranks cannot."""
    from megatron_mergemix.megatron.resident import _by_triton
    from megatron_mergemix.merge import kernel
    from megatron_mergemix.processes.distributed import rank

    def missing(device_type: str) -> str | None:
        return f"no compiler for {device_type}." if rank() in failing else None

    kernel.missing = missing
    return _by_triton("cuda")


def test_triton_merges_on_all_ranks_or_on_none(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_distributed(tried_by_triton, 2, set()) == [True, True]
    assert "warning" not in capfd.readouterr().out
    assert run_distributed(tried_by_triton, 2, {1}) == [False, False]
    assert capfd.readouterr().out.count("warning: rank 1: no compiler for cuda.") == 1


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: "tp{}pp{}dp{}".format(*layout))
def applied(request: pytest.FixtureRequest, trained_experiment: Path):
    ranks = run_distributed(
        corners_and_middle, int(np.prod(request.param)), trained_experiment, request.param
    )
    return request.param, ranks


_LOSSES: dict[tuple[int, int, int], list[float]] = {}


def test_one_hot_weights_are_that_expert_bit_for_bit(applied) -> None:
    for seen, loaded, _, _ in applied[1]:
        for name, weights in seen["math"].items():
            np.testing.assert_array_equal(weights, loaded["math"][name])


def test_the_base_comes_back_bit_for_bit_after_any_candidates(applied) -> None:
    for seen, loaded, _, _ in applied[1]:
        for name, weights in seen["base again"].items():
            np.testing.assert_array_equal(weights, seen["base"][name])
            np.testing.assert_array_equal(weights, loaded["base"][name])


def test_a_merge_is_the_weighted_sum_rounded_once(applied) -> None:
    for seen, loaded, _, _ in applied[1]:
        for name, merged in seen["middle"].items():
            exact = (
                0.7 * loaded["math"][name].astype(np.float64)
                + 0.5 * loaded["code"][name]
                - 0.2 * loaded["prose"][name]
            )
            np.testing.assert_allclose(merged, exact, rtol=1e-6, atol=1e-7)
        for name, merged in seen["half way"].items():
            exact = 0.5 * loaded["base"][name].astype(np.float64) + 0.5 * loaded["code"][name]
            np.testing.assert_allclose(merged, exact, rtol=1e-6, atol=1e-7)


def test_norm_counts_every_parameter_once_under_every_layout(
    applied, trained_experiment: Path
) -> None:
    expected = _task_vector_norm_from_files(trained_experiment, {"code": 0.5})
    for _, _, norms, _ in applied[1]:
        assert norms["half way"] == pytest.approx(expected, rel=1e-6)
        assert norms["base again"] == 0.0


def test_losses_of_a_candidate_do_not_depend_on_the_layout(applied) -> None:
    layout, ranks = applied
    for _, _, _, losses in ranks:
        assert losses == ranks[0][3], "every rank must have the same losses"
    _LOSSES[layout] = ranks[0][3]
    np.testing.assert_allclose(_LOSSES[layout], _LOSSES[LAYOUTS[0]], rtol=2e-6)


def _task_vector_norm_from_files(config_path: Path, alpha: dict[str, float]) -> float:
    """Return the norm by reading whole tensors with torch's own reader, without Megatron."""
    from megatron_mergemix.config import load_config
    from megatron_mergemix.training_runs.experiment_runs import base_checkpoint, expert_checkpoints

    config = load_config(config_path)
    base = read_weights(base_checkpoint(config))
    experts = {name: read_weights(path) for name, path in expert_checkpoints(config).items()}
    square = 0.0
    for name, weight in base.items():
        vector = sum(a * (experts[k][name] - weight) for k, a in alpha.items())
        square += float(np.square(vector).sum())
    return square**0.5


KINDS = {
    "moe ep2": [
        "parallel.tensor=1",
        "parallel.expert=2",
        "model.num_moe_experts=4",
    ],
    "bf16 tp2": ["model.precision=bf16"],
}
ALPHA = {"math": 0.7, "code": -0.4}


def merge_untrained(config_path: Path, changes: list[str], folder: str):
    """Merge a fresh model and two bent copies of it; return what was merged, loaded and saved.

    Of what was merged, also an expert alone and then the base. Besides, what was printed.
    """
    import io
    from contextlib import redirect_stdout

    import torch

    from megatron_mergemix.config import load_config
    from megatron_mergemix.megatron import parallel
    from megatron_mergemix.megatron.dist_checkpoint import load_model, save
    from megatron_mergemix.megatron.model import build_model
    from megatron_mergemix.megatron.resident import ResidentProxy
    from megatron_mergemix.model_facts import vocab_size

    config = load_config(config_path, changes)
    parallel.start(config.parallel)
    chunks = build_model(config, vocab_size(config), seed=3)
    root = config_path.parent / folder
    paths = {"base": save(root / "base", 1, chunks, training={}, keep=1)}
    for step, name in enumerate(ALPHA, start=1):
        load_model(paths["base"], chunks)
        with torch.no_grad():
            for parameter in chunks[0].parameters():
                # Elementwise, so that copies on other ranks stay equal.
                parameter += 0.1 * parameter * torch.sin(300 * step * parameter)
        paths[name] = save(root / name, 1, chunks, training={}, keep=1)
    with redirect_stdout(io.StringIO()) as printed:
        proxy = ResidentProxy(chunks, paths["base"], {name: paths[name] for name in ALPHA})
    norm = proxy.apply(ALPHA)
    merged = weights_of(proxy)
    proxy.apply({"math": 1.0})
    alone = {"math": weights_of(proxy)}
    proxy.apply({})
    alone["base"] = weights_of(proxy)
    loaded = {}
    for name, path in paths.items():
        load_model(path, chunks)
        loaded[name] = weights_of(proxy)
    return merged, alone, loaded, norm, paths, printed.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_moe_experts_and_bf16_shards_merge_like_any_other(
    trained_experiment: Path, kind: str
) -> None:
    ranks = run_distributed(
        merge_untrained, 2, trained_experiment, KINDS[kind], kind.replace(" ", "_")
    )
    files = {name: read_weights(path) for name, path in ranks[0][4].items()}
    square = sum(
        np.square(sum(a * (files[k][name] - weight) for k, a in ALPHA.items())).sum()
        for name, weight in files["base"].items()
    )
    unit = 2.0**-8 if "bf16" in kind else 1e-6
    plan = r"resident: base and 2 experts: \d\.\d\d GiB on the fullest rank, held in the memory "
    assert re.match(plan, ranks[0][-1])
    assert ranks[1][-1] == ""
    for merged, alone, loaded, norm, _, _ in ranks:
        assert norm == pytest.approx(float(square) ** 0.5, rel=1e-6)
        for name, weights in alone.items():
            for key, found in weights.items():
                np.testing.assert_array_equal(found, loaded[name][key], err_msg=f"{name} {key}")
        for name, found in merged.items():
            base = loaded["base"][name].astype(np.float64)
            exact = base + sum(a * (loaded[k][name] - base) for k, a in ALPHA.items())
            np.testing.assert_allclose(found, exact, rtol=unit, atol=1e-7)


def with_nan(config_path: Path) -> str:
    """Make one rank's shard of an expert NaN after loading; every rank must say so."""
    import torch

    from megatron_mergemix.errors import MergeMixError
    from megatron_mergemix.megatron import resident
    from megatron_mergemix.training_runs.experiment_runs import base_checkpoint, expert_checkpoints

    config, chunks = start(config_path, (2, 1, 1))
    original = resident.load_model

    def damaged(path: Path, live) -> None:
        original(path, live)
        if "code" in str(path) and torch.distributed.get_rank() == 1:
            next(iter(live[0].parameters())).data.view(-1)[:3] = float("nan")

    resident.load_model = damaged
    try:
        resident.ResidentProxy(chunks, base_checkpoint(config), expert_checkpoints(config))
    except MergeMixError as error:
        return str(error)
    return "no error"


def test_nan_in_one_ranks_shard_is_named_on_all_ranks(trained_experiment: Path) -> None:
    for message in run_distributed(with_nan, 2, trained_experiment):
        assert "code" in message
        assert "3 NaN or Inf values in embedding.word_embeddings.weight" in message


def from_another_base(config_path: Path) -> str:
    """Take fresh weights for an expert."""
    from megatron_mergemix.errors import CheckpointError
    from megatron_mergemix.megatron.dist_checkpoint import save
    from megatron_mergemix.megatron.resident import ResidentProxy
    from megatron_mergemix.training_runs.experiment_runs import base_checkpoint, expert_checkpoints

    config, chunks = start(config_path, (2, 1, 1))
    stranger = save(config_path.parent / "stranger", 1, chunks, training={}, keep=1)
    experts = {**expert_checkpoints(config), "prose": stranger}
    try:
        ResidentProxy(chunks, base_checkpoint(config), experts)
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_an_expert_of_another_base_is_refused(trained_experiment: Path) -> None:
    for message in run_distributed(from_another_base, 2, trained_experiment):
        assert "expert prose" in message
        assert "was not trained from the base" in message


def one_rank_raises() -> None:
    import torch.distributed as dist

    from megatron_mergemix.processes.distributed import rank, together

    with together():
        if rank() == 1:
            raise ValueError("disk is gone")
    dist.barrier()


def test_an_error_on_one_rank_is_raised_on_all() -> None:
    with pytest.raises(RankFailure) as failure:
        run_distributed(one_rank_raises, 2)
    text = str(failure.value)
    assert "MergeMixError: rank 1: ValueError: disk is gone" in text  # on rank 0
    assert "ValueError: disk is gone" in text
