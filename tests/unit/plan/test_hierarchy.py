"""The example of the paper's hierarchy: it prints its stages, its experts and its cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_mergemix.cli import main
from megatron_mergemix.config import load_config
from megatron_mergemix.errors import ConfigError
from megatron_mergemix.plan.make import make_plan

EXAMPLE = Path(__file__).parents[3] / "examples" / "hierarchy" / "mix.yaml"


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["plan", str(EXAMPLE), "--settings-only", "--json", *words]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_the_example_is_the_papers_hierarchy() -> None:
    groups = load_config(EXAMPLE).leaves_by_group()
    assert {name: len(leaves) for name, leaves in groups.items()} == {
        "math": 4,
        "code": 3,
        "sft": 3,
        "web": 5,
    }


def test_fifteen_experts_cost_as_many_times_more_than_one_per_group(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = plan(capsys)
    # 8.6B parameters, 1.43B active: the paper's appendix A.
    assert found["parameters"]["total"] == pytest.approx(8.6e9, rel=0.04)
    assert found["parameters"]["active"] == pytest.approx(1.43e9, rel=0.01)
    costs = {cost["what"]: cost for cost in found["costs"]}
    experts = costs["experts"]
    assert experts["runs"] == 15
    # 299 steps of 2048 x 8192 tokens are a little more than 5e9.
    assert experts["tokens"] == 15 * 299 * 2048 * 8192
    (coarse,) = [each for each in found["alternatives"] if "per group" in each["what"]]
    assert (coarse["runs"], coarse["tokens"]) == (4, 4 * 5e9)
    assert coarse["flops"] == pytest.approx(6 * found["parameters"]["active"] * 2e10)
    assert experts["flops"] / coarse["flops"] == pytest.approx(15 / 4, rel=0.005)
    assert costs["search"]["runs"] == sum(stage[2] for stage in found["stages"])


def test_every_stage_has_its_budget(capsys: pytest.CaptureFixture[str]) -> None:
    stages = {stage[0]: stage[2] for stage in plan(capsys)["stages"]}
    assert stages == {"coarse": 43, "math": 26, "code": 18, "sft": 18, "web": 34, "composed": 3}
    words = ["--set=search.hierarchy=bottom_up", "--set=search.group_trials=10"]
    stages = {stage[0]: stage[2] for stage in plan(capsys, *words)["stages"]}
    assert stages == {
        "leaves": 18, "math": 12, "code": 12, "sft": 12, "web": 12, "coarse": 42, "composed": 1,
    }  # fmt: skip


def test_the_stages_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(EXAMPLE), "--settings-only"]) == 0
    printed = capsys.readouterr().out
    assert "stages of the search, each over what it mixes" in printed
    assert "web_math, math_qa, study_notes, formal_math" in printed
    assert "one expert per group, no search inside" in printed


def test_too_few_trials_for_a_group_are_found_by_the_plan() -> None:
    with pytest.raises(ConfigError, match=r"stage web, whose trials search\.group_trials gives"):
        make_plan(EXAMPLE, ["search.group_trials=6"], settings_only=True)
