"""Experts that ``pretrain_gpt.py`` saved under several layouts, merged on disk, loaded by it again.

The oracle merges in memory: Megatron loads every expert into a live model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from megatron_mergemix.cli import main
from tests.support.megatron_lm import TINY_GPT, checkouts, each_checkout, run_pretrain_gpt
from tests.support.weights import read_weights

MODEL = (
    *TINY_GPT,
    *("--swiglu", "--disable-bias-linear", "--position-embedding-type", "rope"),
    *("--make-vocab-size-divisible-by", "64", "--mock-data", "--clip-grad", "0"),
    *("--lr", "1e-2", "--lr-decay-style", "constant", "--eval-iters", "1"),
)
MOE = (
    *("--num-experts", "4", "--moe-router-topk", "2"),
    *("--moe-token-dispatcher-type", "alltoall", "--moe-aux-loss-coeff", "0.01"),
)
TP2, PP2 = ("--tensor-model-parallel-size", "2"), ("--pipeline-model-parallel-size", "2")
VPP = (*PP2, "--num-layers-per-virtual-pipeline-stage", "1")
EP2 = ("--expert-model-parallel-size", "2")
FRESH = ("--finetune", "--no-load-optim", "--no-load-rng")
CPU_MODE = "megatron_mergemix.megatron.cpu_mode"
WEIGHTS = (0.5, 0.3, 0.4)


class Trained(NamedTuple):
    checkout: Path
    base: Path
    experts: list[Path]


def train(checkout: Path, root: Path, layout: Sequence[str], *more: str) -> Path:
    """Train two steps from ``more`` and return the root."""
    ranks = 1 if not layout else 2
    saving = ("--train-iters", "2", "--eval-interval", "9", "--save-interval", "2")
    arguments = [*MODEL, *saving, "--save", str(root), *layout, *more]
    done = run_pretrain_gpt(checkout, ranks, arguments, timeout=300)
    assert done.returncode == 0, done.stdout
    return root


def validation_loss(
    checkout: Path, root: Path, layout: Sequence[str], *more: str, merged: str = ""
) -> float:
    """Return the loss of a checkpoint that is loaded as a user would load it."""
    evaluating = ("--train-iters", "2", "--eval-interval", "9", "--skip-train")
    arguments = [*MODEL, *evaluating, "--load", str(root), *FRESH, *layout, *more]
    if (root / "mergemix.json").exists():  # nothing is missing, nothing is left over
        arguments += ["--dist-ckpt-strictness", "raise_all"]
    done = run_pretrain_gpt(
        checkout,
        1 if not layout else 2,
        arguments,
        launcher="tests.support.merge_in_memory"
        if merged
        else "megatron_mergemix.megatron.cpu_mode",
        env={"MERGE_IN_MEMORY": merged},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    found = re.search(r"on validation set \| lm loss value: (\S+) ", done.stdout)
    assert found is not None, done.stdout
    return float(found[1])


def folder_of(root: Path) -> Path:
    return root / "iter_0000002"


def in_memory(trained: Trained, weights: Sequence[float]) -> str:
    pairs = zip(trained.experts, weights, strict=True)
    return json.dumps({str(folder_of(root)): weight for root, weight in pairs})


def merge(trained: Trained, weights: Sequence[float], target: Path, *more: str) -> Path:
    arguments = ["merge", "--base", str(trained.base), "--output", str(target), *more]
    for root, weight in zip(trained.experts, weights, strict=True):
        arguments += ["--expert", f"{root}={weight}"]
    assert main(arguments) == 0
    return target


@pytest.fixture(scope="module")
def dense(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("dense")
    base = train(checkout, root / "base", ())
    start = ("--load", str(base), *FRESH)
    return Trained(
        checkout,
        base,
        [
            train(checkout, root / "tp1", (), *start, "--seed", "11"),
            train(checkout, root / "tp2", TP2, *start, "--seed", "12"),
            train(checkout, root / "pp2", PP2, *start, "--seed", "13"),
        ],
    )


@each_checkout()
def test_a_merge_over_layouts_has_the_loss_of_the_merge_in_memory(
    checkout: Path, dense: Trained, tmp_path: Path
) -> None:
    target = merge(dense, WEIGHTS, tmp_path / "merged", "--method", "task_arithmetic")
    expected = validation_loss(checkout, dense.base, (), merged=in_memory(dense, WEIGHTS))
    assert expected != validation_loss(checkout, dense.base, ())
    for layout in ((), TP2, PP2):
        assert validation_loss(checkout, target, layout) == pytest.approx(expected, rel=3e-6)


@pytest.mark.nightly
@each_checkout()
def test_each_layout_is_loaded_by_the_versions_that_know_it(
    checkout: Path, dense: Trained, tmp_path: Path
) -> None:
    common = merge(dense, (1, 0, 0), tmp_path / "one")
    entry = merge(dense, (1, 0, 0), tmp_path / "two", "--layout", "common_state")
    expected = validation_loss(checkout, dense.experts[0], TP2)
    assert validation_loss(checkout, common, TP2) == expected
    if not (folder_of(dense.base) / "common.pt").exists():
        assert validation_loss(checkout, entry, TP2) == expected


@pytest.mark.nightly
@each_checkout()
def test_every_other_version_loads_the_merge_bit_for_bit(
    checkout: Path, dense: Trained, tmp_path: Path
) -> None:
    """A step with a learning rate of zero saves what was loaded."""
    target = merge(dense, (0, 1, 0), tmp_path / "merged")
    still = ("--lr", "0", "--dist-ckpt-strictness", "raise_all")
    for other in [version for version in checkouts() if version != checkout] or [checkout]:
        root = train(other, tmp_path / other.name, (), "--load", str(target), *FRESH, *still)
        loaded, expert = read_weights(folder_of(root)), read_weights(folder_of(dense.experts[1]))
        assert loaded.keys() == expert.keys()
        for name, tensor in expert.items():
            np.testing.assert_array_equal(loaded[name], tensor)


@each_checkout()
def test_one_hot_weights_are_that_expert_bit_for_bit(
    checkout: Path, dense: Trained, tmp_path: Path
) -> None:
    for number in range(3):
        weights = [float(number == other) for other in range(3)]
        merged = read_weights(merge(dense, weights, tmp_path / str(number)) / "release")
        expert = read_weights(folder_of(dense.experts[number]))
        assert merged.keys() == expert.keys()
        for name, tensor in expert.items():
            np.testing.assert_array_equal(merged[name], tensor)


@pytest.mark.nightly
@each_checkout()
def test_moe_experts_of_other_ranks_are_merged_router_included(
    checkout: Path, tmp_path: Path
) -> None:
    base = train(checkout, tmp_path / "base", EP2, *MOE)
    start = ("--load", str(base), *FRESH, *MOE)
    experts = [
        train(checkout, tmp_path / "ep2", EP2, *start, "--seed", "21"),
        train(checkout, tmp_path / "ep1", (), *start, "--seed", "22"),
    ]
    trained = Trained(checkout, base, experts)
    target = merge(trained, (0.6, 0.4), tmp_path / "merged")
    expected = validation_loss(checkout, base, EP2, *MOE, merged=in_memory(trained, (0.6, 0.4)))
    for layout in ((), EP2):
        assert validation_loss(checkout, target, layout, *MOE) == pytest.approx(expected, rel=3e-6)
    router = "decoder.layers.mlp.router.weight"
    merged, first, second = (
        read_weights(path)[router] for path in (target / "release", *map(folder_of, experts))
    )
    assert not np.array_equal(first, second)
    np.testing.assert_allclose(merged, 0.6 * first + 0.4 * second, rtol=1e-6, atol=1e-8)


@pytest.mark.nightly
@each_checkout(newest=True)
def test_an_expert_of_interleaved_stages_is_merged_with_one_of_a_single_rank(
    checkout: Path, tmp_path: Path
) -> None:
    deep = ("--num-layers", "4")
    base = train(checkout, tmp_path / "base", VPP, *deep, "--save-interval", "1")
    later = tmp_path / "later"
    later.mkdir()
    folder_of(base).rename(folder_of(later))
    for root, step in ((base, "1"), (later, "2")):
        (root / "latest_checkpointed_iteration.txt").write_text(step)
    start = ("--load", str(base), *FRESH, *deep)
    experts = [later, train(checkout, tmp_path / "tp1", (), *start, "--seed", "32")]
    trained = Trained(checkout, base, experts)
    target = merge(trained, (0.6, 0.4), tmp_path / "merged")
    expected = validation_loss(checkout, base, (), *deep, merged=in_memory(trained, (0.6, 0.4)))
    assert validation_loss(checkout, target, (), *deep) == pytest.approx(expected, rel=3e-6)
