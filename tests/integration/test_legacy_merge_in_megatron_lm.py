"""Legacy checkpoints that ``pretrain_gpt.py`` saved, merged on disk, loaded by it again.

Base and experts are saves of one run, apart from each other by a training step. The oracle merges
in memory: Megatron loads every one into a live model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from megatron_mergemix.cli import main
from tests.integration.test_merge_in_megatron_lm import (
    CPU_MODE,
    EP2,
    FRESH,
    MODEL,
    MOE,
    PP2,
    TP2,
)
from tests.support.megatron_lm import each_checkout, run_pretrain_gpt

LEGACY = (*MODEL, "--ckpt-format", "torch", "--train-iters", "3", "--eval-interval", "9")
LAYOUTS = {
    "one rank, distributed optimizer": ("--use-distributed-optimizer",),
    "tensor": TP2,
    "pipeline": PP2,
    "MoE experts": (*EP2, *MOE),
}
EACH_LAYOUT = pytest.mark.parametrize(
    "layout",
    [
        pytest.param(words, id=name, marks=() if name == "pipeline" else pytest.mark.nightly)
        for name, words in LAYOUTS.items()
    ],
)


def run(
    checkout: Path, layout: Sequence[str], *more: str, merged: dict[str, float] | None = None
) -> str:
    done = run_pretrain_gpt(
        checkout,
        2 if layout[0].endswith("-parallel-size") else 1,
        [*LEGACY, *layout, *more],
        launcher=CPU_MODE if merged is None else "tests.support.merge_in_memory",
        env={"MERGE_IN_MEMORY": json.dumps(merged)},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def validation_loss(output: str) -> float:
    found = re.search(r"on validation set \| lm loss value: (\S+) ", output)
    assert found is not None, output
    return float(found[1])


def files(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Return rank -> its model, as torch reads it."""
    return {
        path.parent.name: torch.load(path, weights_only=False)["model"]
        for path in sorted(folder.glob("mp_rank_*/model_optim_rng.pt"))
    }


@EACH_LAYOUT
@each_checkout()
def test_a_merge_has_the_loss_of_the_merge_in_memory(
    checkout: Path, layout: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, target = tmp_path / "run", tmp_path / "merged"
    run(checkout, layout, "--save", str(root), "--save-interval", "1")
    base, first, second = (root / f"iter_{number:07d}" for number in (1, 2, 3))
    arguments = ["merge", "--base", str(base), "--method", "task_arithmetic"]
    experts = ["--expert", f"{first}=0.4", "--expert", f"{second}=0.7"]
    assert main([*arguments, *experts, "--output", str(target)]) == 0
    loading = (*FRESH, "--skip-train")
    in_memory = {str(first): 0.4, str(second): 0.7}
    from_base = ("--load", str(root), "--ckpt-step", "1", *loading)
    expected = validation_loss(run(checkout, layout, *from_base, merged=in_memory))
    found = validation_loss(run(checkout, layout, "--load", str(target), *loading))
    assert found == pytest.approx(expected, rel=3e-6)

    one = tmp_path / "one"
    assert main(["merge", "--base", str(base), "--expert", f"{first}=1", "--output", str(one)]) == 0
    monkeypatch.syspath_prepend(str(checkout))  # for the classes in the files
    merged, expert, before = files(one / "release"), files(first), files(base)
    assert merged.keys() == expert.keys()
    for rank, model in expert.items():
        assert list(merged[rank]) == list(model)
        tensors = [name for name, value in model.items() if value is not None]
        assert all(torch.equal(merged[rank][name], model[name]) for name in tensors)
        assert not all(torch.equal(before[rank][name], model[name]) for name in tensors)
    if layout is PP2:
        stages = files(target / "release")
        tied = stages["mp_rank_00_000"]["embedding.word_embeddings.weight"]
        assert torch.equal(tied, stages["mp_rank_00_001"]["output_layer.weight"])
