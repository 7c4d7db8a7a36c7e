"""Hours in a plan: what is reckoned, printed and refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from megatron_mergemix.cli import main
from megatron_mergemix.config import ModelFacts, load_config
from megatron_mergemix.errors import ConfigError, MergeMixError
from megatron_mergemix.model_facts import record_launch
from megatron_mergemix.plan.hardware import GPUS, gpu_of
from megatron_mergemix.plan.make import Plan, make_plan
from megatron_mergemix.plan.outlook import Hardware, Outlook
from megatron_mergemix.plan.search_cost import Workload, search_cost
from tests.support.untrained import given, write_config

H100 = Hardware(GPUS["h100"])
NUMBER = r" +[\d.,<]+"


@pytest.fixture
def mix(tmp_path: Path) -> Path:
    return write_config(tmp_path)


def outlook(path: Path, hardware: Hardware, *overrides: str) -> Outlook:
    found = make_plan(path, overrides, hardware=hardware).outlook
    assert found is not None
    return found


def test_without_a_gpu_nothing_is_reckoned(mix: Path) -> None:
    assert make_plan(mix).outlook is None


def test_the_search_of_this_experiment_is_reckoned_from_its_settings(mix: Path) -> None:
    plan: Plan = make_plan(mix, hardware=H100)
    config = load_config(mix)
    assert config.model is not None
    costs = {cost.what: cost for cost in plan.costs}
    work = Workload(
        model=config.model,
        vocab_size=257,
        parallel=config.parallel,
        experts=3,
        models=costs["search"].runs,
        sequences=9,
        micro_batch_size=8,
        resident="auto",
        expert_tokens=costs["experts"].tokens,
    )
    assert plan.outlook is not None
    assert plan.outlook.own == search_cost(work, GPUS["h100"])
    assert (plan.outlook.windows, plan.outlook.models) == (9, costs["search"].runs)
    assert plan.outlook.scale == ()


def test_given_experts_are_not_trained(mix: Path) -> None:
    experts = {name: str(given(mix, name, 2.0)) for name in ("math", "code", "web")}
    base = f"base={{checkpoint: {given(mix, 'base', 1.0)}}}"
    own = outlook(mix, H100, base, f"experts.checkpoints={experts}").own
    assert own is not None
    assert own.experts_hours is None


def test_gpus_are_the_processes_of_the_layout(mix: Path) -> None:
    own = outlook(mix, Hardware(GPUS["h100"], gpus=2)).own
    assert own is not None
    assert (own.gpus, own.replicas) == (2, 2)
    with pytest.raises(ConfigError, match=r"--gpus is 3, expected a multiple of 2 \(parallel"):
        outlook(mix, Hardware(GPUS["h100"], gpus=3), "parallel={processes: 2, tensor: 2}")


def test_more_gpus_change_the_hours_and_ask_nothing_of_the_training_here(mix: Path) -> None:
    """Neither the batch of the experts nor the nodes of a cluster are made for them."""
    cluster = "slurm={nodes: 1, gpus_per_node: 1}"
    plan = make_plan(mix, [cluster], hardware=Hardware(GPUS["h100"], gpus=512, scale=True))
    assert plan.outlook is not None
    assert plan.outlook.own is not None
    assert plan.outlook.own.replicas == 512
    assert plan.training_memory == make_plan(mix, [cluster]).training_memory


def test_where_copies_lie_follows_search_resident(mix: Path) -> None:
    own = outlook(mix, H100, "search.resident=file").own
    assert own is not None
    assert own.place == "file"
    tiny = Hardware(gpu_of("h100,memory=1e9"))
    with pytest.raises(MergeMixError, match="search.resident is device"):
        outlook(mix, tiny, "search.resident=device")


def test_a_search_without_room_is_a_warning(mix: Path) -> None:
    plan = make_plan(mix, hardware=Hardware(gpu_of("h100,memory=1e9")))
    assert "a rank of the search has no room on h100,memory=1e9" in plan.warnings[-1]
    assert not any("no room" in text for text in make_plan(mix, hardware=H100).warnings)


def test_larger_models_are_reckoned_with_the_windows_and_tokens_of_this_experiment(
    mix: Path,
) -> None:
    found = outlook(mix, Hardware(GPUS["h100"], scale=True))
    assert [(row.model, row.experts, row.gpus) for row in found.scale] == [
        ("8B", 4, 64),
        ("8B", 16, 64),
        ("70B", 4, 64),
        ("70B", 16, 64),
    ]
    costs = [row.cost for row in found.scale]
    assert all(cost is not None and cost.fits for cost in costs)
    small = costs[0]
    assert small is not None
    # 330 tokens for each of 4 experts: 6 N D over 64 GPUs at 40 % of 989.5 TFLOP/s.
    expected = 6 * small.parameters * 4 * 330 / (64 * 0.4 * 989.5e12) / 3600
    assert small.experts_hours == pytest.approx(expected)
    # In bf16, base and four experts.
    assert small.copies == 5 * small.live


def test_a_model_without_room_in_any_layout_has_no_cost(mix: Path) -> None:
    found = outlook(mix, Hardware(GPUS["h100"], gpus=1, scale=True))
    assert [row.cost is None for row in found.scale] == [False, False, True, True]


@pytest.fixture
def launched(mix: Path) -> Path:
    """The same experiment with a launch of Megatron-LM, which brings the model."""
    settings = yaml.safe_load(mix.read_text())
    for section in ("model", "parallel", "training"):
        settings.pop(section, None)
    settings |= {
        "base": {"checkpoint": str(given(mix, "base", 1.0))},
        "launch": {"kind": "command"},
    }
    mix.write_text(yaml.safe_dump(settings, sort_keys=False))
    return mix


def test_a_launch_has_hours_for_larger_models_only(launched: Path) -> None:
    with pytest.raises(ConfigError, match=r"not known before its first start"):
        make_plan(launched, hardware=H100)
    training = {"training": {"save_interval": 2}}
    facts = ModelFacts(seq_length=8, global_batch_size=4, scoring={}, training=training)
    record_launch(load_config(launched).model_copy(update={"launched": facts}))
    with pytest.raises(ConfigError, match=r"expected --scale beside it"):
        make_plan(launched, hardware=H100)
    found = outlook(launched, Hardware(GPUS["h100"], gpus=32, scale=True))
    assert found.own is None
    assert found.seq_length == 8
    assert [row.gpus for row in found.scale] == [32] * 4


# ---- the command line ----


def test_the_table_shows_this_experiment_and_the_larger_ones(
    mix: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(mix), "--gpu", "h100", "--scale"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^hours on h100: \d+ models scored on 9 windows of 8 tokens", out, re.M)
    for name, experts in (("yours", 3), ("8B", 4), ("8B", 16), ("70B", 4), ("70B", 16)):
        row = rf"^ +{name} +{experts}{NUMBER * 6} +device{NUMBER * 7} *$"
        assert re.search(row, out, re.M), out
    assert "Assumed: 50% of the peak FLOP/s in a forward pass and 40% in training" in out


def test_what_has_no_room_is_shown_as_such(mix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(mix), "--gpu", "h100", "--gpus", "1", "--scale"]) == 0
    assert re.search(r"^ +70B +4 +1 +- .* no room ", capsys.readouterr().out, re.M)


def test_json_has_gpu_assumptions_and_costs(mix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(mix), "--gpu", "h200", "--scale", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)["outlook"]
    assert record["gpu"]["bandwidth"] == 4.8e12
    assert record["efficiency"]["training"] == 0.4
    assert record["own"]["place"] == "device"
    assert len(record["scale"]) == 4
    assert record["scale"][3]["cost"]["experts"] == 16


@pytest.mark.parametrize("option", [["--gpus", "8"], ["--scale"]])
def test_options_of_a_gpu_need_one(
    option: list[str], mix: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(mix), *option]) == 1
    assert "--gpus and --scale need --gpu" in capsys.readouterr().err


def test_an_unknown_gpu_is_refused(mix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(mix), "--gpu", "h1000"]) == 1
    assert "'h1000' is not known. Did you mean h100?" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "-1", "many", "1.5"])
def test_gpus_are_counted_in_whole_numbers(count: str, mix: Path) -> None:
    with pytest.raises(SystemExit):
        main(["plan", str(mix), "--gpu", "h100", f"--gpus={count}"])
