"""The stages with a mixture of MoE experts, spread over ranks, and with virtual stages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from tests.support.megatron_lm import each_checkout
from tests.support.plugin import (
    MODEL,
    PP2,
    STEPS,
    BigRun,
    Launches,
    assert_same_scores,
)
from tests.support.weights import assert_same_weights

pytestmark = pytest.mark.timeout(900)

SPREAD = ("--expert-model-parallel-size", "2")
VIRTUAL = (
    *(*PP2, "--num-layers-per-virtual-pipeline-stage", "1"),
    *("--microbatch-group-size-per-virtual-pipeline-stage", "64"),  # more than are scored at once
)
LAST = f"iter_{STEPS:07d}"
MOE = ("--num-experts", "4", "--moe-router-topk", "2", "--moe-token-dispatcher-type=alltoall")


@pytest.fixture(scope="module")
def moe(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """Four layers of four MoE experts: a base, two domains' experts and a search under EP2."""
    places = zip(("", *MODEL), MODEL, strict=False)
    four = [word if last != "--num-layers" else "4" for last, word in places]
    made = Launches(checkout, tmp_path_factory.mktemp("moe"), model=(*four, *MOE))
    made.write()
    settings = yaml.safe_load(made.config.read_text())
    del settings["domains"]["prose"]
    settings["experts"]["general_share"] = 0.0
    for domain in settings["domains"].values():
        del domain["bounds"]  # the search tries each expert alone
    made.config.write_text(yaml.safe_dump(settings, sort_keys=False))
    for expert in settings["domains"]:
        done = made.stage("expert", *SPREAD, ranks=2, expert=expert)
        assert done.returncode == 0, done.stdout
    done = made.stage("search", *SPREAD, ranks=2)
    assert done.returncode == 0, done.stdout
    return made


@each_checkout()
@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        pytest.param((), 1, id="one rank"),
        pytest.param(VIRTUAL, 2, id="virtual stages", marks=pytest.mark.nightly),
    ],
)
def test_a_search_with_spread_moe_experts_scores_as_others_do(
    checkout: Path, moe: Launches, layout: Sequence[str], ranks: int, tmp_path: Path
) -> None:
    other = moe.with_settings(tmp_path.name, {"run_dir": str(moe.home / tmp_path.name)})
    shutil.copytree(moe.run_dir, other.run_dir, symlinks=True)
    shutil.rmtree(other.run_dir / "search")
    done = other.stage("search", *layout, ranks=ranks)
    assert done.returncode == 0, done.stdout
    assert_same_scores(other.trials(), moe.trials(), rtol=1e-5)


@pytest.mark.nightly
@each_checkout()
def test_a_spread_reference_of_one_domain_is_its_expert_and_scores_as_in_the_search(
    checkout: Path, moe: Launches
) -> None:
    mixture = ("--mergemix-mixture", "math=1")
    for stage in ("reference", "evaluate"):
        done = moe.stage(stage, *SPREAD, *mixture, ranks=2)
        assert done.returncode == 0, done.stdout
    reference = moe.run_dir / "references" / "math_1"
    expert = moe.run_dir / "experts" / "math"
    assert_same_weights(*(folder / "checkpoints" / LAST for folder in (reference, expert)))
    (vertex,) = (trial for trial in moe.trials() if trial.mixture == {"math": 1.0, "code": 0.0})
    scores = json.loads((reference / "scores.json").read_text())["scores"]
    assert scores.keys() == vertex.scores.keys()
    for capability, metrics in vertex.scores.items():
        for metric, score in metrics.items():
            assert scores[capability][metric]["value"] == pytest.approx(score.value, rel=1e-6)


@pytest.mark.nightly
@each_checkout()
def test_a_spread_training_run_draws_its_blend(
    checkout: Path, moe: Launches, tmp_path: Path
) -> None:
    run = BigRun(tmp_path, layout=SPREAD)
    shares = {"math": 0.75, "code": 0.25}
    words = " ".join(f"{share} {moe.home}/data/{name}" for name, share in shares.items())
    (tmp_path / "data_args.txt").write_text(words)
    blend = ("--mergemix-blend", str(tmp_path), "--eval-iters", "0")
    done = moe.stage("train", *run.words, *blend, ranks=2)
    assert done.returncode == 0, done.stdout
    assert run.drawn() == [12, 4]
