"""What scoring costs: the experts too, where they are scored, and commands beside each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mergemix.config import load_config
from megatron_mergemix.plan.hardware import GPUS
from megatron_mergemix.plan.make import make_plan
from megatron_mergemix.plan.outlook import Hardware
from megatron_mergemix.plan.part_costs import command_hours
from tests.support.untrained import write_config

PURE = "experts.general_share=0"


@pytest.fixture
def mix(tmp_path: Path) -> Path:
    return write_config(tmp_path)


def models(path: Path, *overrides: str) -> dict[str, int]:
    return {cost.what: cost.runs for cost in make_plan(path, overrides).costs}


def test_an_ensemble_is_one_more_pass_of_every_expert(mix: Path) -> None:
    gpu = Hardware(GPUS["h100"])
    plain, both = (make_plan(mix, more, hardware=gpu) for more in ([], ["search.ensemble=true"]))
    passes = {cost.what: cost for cost in both.costs}
    assert passes["ensemble"].runs == 3
    assert both.search_flops - plain.search_flops == passes["ensemble"].flops > 0
    assert plain.outlook is not None
    assert both.outlook is not None
    assert both.outlook.models == plain.outlook.models + 3


def test_experts_that_are_no_trial_are_scored_alone(mix: Path) -> None:
    assert models(mix)["experts alone"] == 3, "with a general share none is"
    assert "experts alone" not in models(mix, PURE)
    assert models(mix, PURE, "domains.math.bounds=[0, 0.5]")["experts alone"] == 1
    most = ["domains.math.max_epochs=1", "blend.train_tokens=1e7"]
    assert models(mix, PURE, *most)["experts alone"] == 1


@pytest.mark.parametrize(
    ("timeouts", "at_once", "hours"),
    [
        ([3600], 4, 10.0),
        ([3600, 36], 2, 10.0),
        ([3600, 3600, 3600], 2, 20.0),
        ([1800, 1800, 3600], 2, 15.0),
    ],
)
def test_commands_of_one_model_run_beside_each_other_and_models_do_not(
    mix: Path, timeouts: list[int], at_once: int, hours: float
) -> None:
    run = "run: 'eval {checkpoint} {output}', metrics: [a]"
    changes = [
        f"evaluate.capabilities.own{place}={{command: {{{run}, timeout: {timeout}}}}}"
        for place, timeout in enumerate(timeouts)
    ]
    config = load_config(mix, [*changes, f"evaluate.commands_at_once={at_once}"])
    assert command_hours(config, models=10) == pytest.approx(hours)
