"""The plan of a whole small experiment, number by number, and how it is printed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from megatron_mergemix.cli import main
from megatron_mergemix.config import ModelFacts, load_config
from megatron_mergemix.errors import ConfigError, DataError
from megatron_mergemix.model_facts import record_launch
from megatron_mergemix.plan.make import make_plan
from megatron_mergemix.plan.part_costs import Cost
from megatron_mergemix.plan.runs import RunPlan
from megatron_mergemix.plan.tables import amount, binary
from tests.support import lm_eval_tasks
from tests.support.blocked_imports import run_without
from tests.support.tiny_dataset import write_dataset
from tests.support.torch_dist import write_checkpoint

# The model of test_cost: 3,560 parameters.
SETTINGS = """\
run_dir: {root}/run
model: {{num_layers: 2, hidden_size: 8, num_attention_heads: 4, num_query_groups: 2,
        ffn_hidden_size: 20, seq_length: 16, make_vocab_size_divisible_by: 16}}
training: {{global_batch_size: 4, micro_batch_size: 2, save_interval: 17}}
base: {{train: {{tokens: 1000, lr: 1e-3}}}}
domains:
  math: {{prefixes: {{{root}/math_a: 3, {root}/math_b: 1}}}}
  code: {{prefixes: [{root}/code], max_epochs: 2, bounds: [0.1, 0.9]}}
experts: {{tokens: 1e4}}
evaluate:
  capabilities:
    a: {{loss: {{prefixes: [{root}/held], sequences: 4}}}}
    b: {{loss: {{prefixes: [{root}/held], sequences: 6}}}}
search: {{trials: 20}}
blend: {{train_tokens: 20000, split: "1"}}
"""


@pytest.fixture
def mix(tmp_path: Path) -> Path:
    for name, documents in (("math_a", 20), ("math_b", 10), ("code", 40), ("held", 4)):
        write_dataset(tmp_path / name, [np.arange(100)] * documents)
    path = tmp_path / "mix.yaml"
    path.write_text(SETTINGS.format(root=tmp_path))
    return path


def test_domains_are_counted_and_bounded(mix: Path) -> None:
    math, code = make_plan(mix).domains
    assert (math.documents, math.train_tokens, math.low, math.high) == (30, 3000, 0.0, 1.0)
    assert math.proportional == pytest.approx(3 / 7)
    # 2 epochs of 4,000 tokens are 0.4 of 20,000, less than the bound of 0.9.
    assert (code.documents, code.train_tokens, code.low, code.high) == (40, 4000, 0.1, 0.4)
    # 157 steps of 64 tokens are 10,048, of which 0.875 are the expert's own domain.
    assert code.expert_epochs == pytest.approx(0.875 * 10_048 / 4000)


def test_components_mix_general_data_into_every_expert(mix: Path) -> None:
    plan = make_plan(mix, ["experts.general_mixture={math: 1.0}"])
    assert plan.components == {
        "math": {"math": 1.0, "code": 0.0},
        "code": {"math": 0.25, "code": 0.75},
    }


COMPONENTS = (
    "experts.components={even: uniform, algebra: {math: 0.9, code: 0.1}, hack: {code: 1.0}}"
)


def test_components_of_ones_own_are_planned_by_their_names(mix: Path) -> None:
    plan = make_plan(mix, [COMPONENTS])
    assert plan.components == {
        "even": {"math": 0.5, "code": 0.5},
        "algebra": {"math": 0.9, "code": 0.1},
        "hack": {"math": 0.0, "code": 1.0},
    }
    assert plan.general_share is None
    trained = [run.name for run in plan.runs if run.name.startswith("experts/")]
    assert trained == ["experts/even", "experts/algebra", "experts/hack"]
    math, code = plan.domains
    assert math.expert_epochs == pytest.approx(0.9 * 10_048 / 3000)  # of algebra
    assert code.expert_epochs == pytest.approx(1.0 * 10_048 / 4000)  # of hack


def test_cost_and_memory_count_every_expert(mix: Path) -> None:
    plan = make_plan(mix, [COMPONENTS])
    assert plan.costs[1] == Cost("experts", 3, 3 * 10_048, 6.0 * 3560 * 3 * 10_048)
    assert plan.search_memory is not None
    assert plan.search_memory.base_and_experts == (1 + 3) * plan.search_memory.live


def test_the_norm_of_merge_weights_is_planned_within_the_bounds(mix: Path) -> None:
    """The rows are (.875, .125) and (.125, .875); code gets .1 to .4 of a mixture."""
    noise = make_plan(mix).amplification
    assert noise.vertices == pytest.approx(
        {"math": np.hypot(31, -1) / 30, "code": np.hypot(19, 11) / 30}
    )
    # The mixture nearest to uniform has as much code as is allowed.
    assert noise.uniform == pytest.approx(noise.vertices["code"])


def test_large_merge_weights_are_a_warning_that_says_what_they_do(mix: Path) -> None:
    """Rows (.55, .45) and (.45, .55); .9 of math takes 4.5 and -3.5."""
    study, warning = make_plan(mix, ["experts.general_share=0.9"]).warnings
    assert study.startswith("experts.general_share is 0.9, which the study")
    assert warning.startswith("the vertex of math has merge weights (alpha) of norm 5.7: ")
    assert "times the noise of one expert's training" in warning
    assert "lower experts.general_share" in warning


def test_experts_unlike_those_that_ranked_well_in_the_study_are_a_warning(mix: Path) -> None:
    (pure,) = make_plan(mix, ["experts.general_share=0"]).warnings
    assert pure.startswith("Every expert is of one domain alone.")
    (own,) = make_plan(
        mix, ["experts.components={a: {math: 0.9, code: 0.1}, b: {code: 1}}"]
    ).warnings
    assert own.startswith("The experts have mixtures of your own choice")


def test_components_that_are_too_much_alike_are_refused_before_anything_runs(mix: Path) -> None:
    rows = "{a: {math: 0.5, code: 0.5}, b: {math: 0.5001, code: 0.4999}}"
    with pytest.raises(ConfigError, match="condition number .* at most 1000 is accepted") as caught:
        make_plan(mix, [f"experts.components={rows}"])
    assert "Nearly dependent rows: experts.components.a, experts.components.b." in str(caught.value)


def test_runs_are_whole_steps_and_find_the_most_repeated_dataset(mix: Path) -> None:
    runs = {run.name: run for run in make_plan(mix).runs}
    assert list(runs) == [
        "base",
        "experts/math",
        "experts/code",
        "references/learned",
        "references/uniform",
        "references/proportional",
    ]
    # Half of 1,024 tokens from math, three quarters of that from 2,000 tokens of math_a.
    assert (runs["base"].steps, runs["base"].tokens) == (16, 1024)
    assert runs["base"].epochs == pytest.approx(1024 * 0.5 * 0.75 / 2000)
    math = runs["experts/math"]
    assert (math.steps, math.tokens, Path(math.repeated or "").name) == (157, 10_048, "math_a")
    assert math.epochs == pytest.approx(10_048 * 0.875 * 0.75 / 2000, rel=1e-5)
    assert runs["references/learned"] == RunPlan("references/learned", 157, 4, 10_048, None, None)


def test_an_expert_that_is_one_save_is_warned_of_unless_that_is_meant(mix: Path) -> None:
    plan = make_plan(mix)
    assert plan.warnings == []
    assert plan.runs[0].averaged == 1
    assert {run.averaged for run in plan.runs[1:]} == {4}  # after 119, 136, 153 and all 157 steps
    [warning] = make_plan(mix, ["training.save_interval=500"]).warnings
    assert "no other lies in the last third of its 157 steps" in warning
    assert "training.save_interval, or --save-interval of a launch, 17 or less" in warning
    meant = ["training.save_interval=500", "experts.average_last=1"]
    assert make_plan(mix, meant).warnings == []


def test_a_race_may_cost_less_than_is_counted(mix: Path) -> None:
    [warning] = make_plan(mix, ["search.first_share=0.25"]).warnings
    assert warning.startswith("the search's cost is the most it can be")
    assert "scored on 25% of the items alone" in warning


def test_costs_are_six_and_two_per_parameter_and_token(mix: Path) -> None:
    plan = make_plan(mix)
    assert plan.parameters.active == 3560
    # 20 trials and 3 more, each 10 sequences of 16 tokens; 5 on 3 that were held out; the experts.
    assert plan.costs == [
        Cost("base", 1, 1024, 6.0 * 3560 * 1024),
        Cost("experts", 2, 20_096, 6.0 * 3560 * 20_096),
        Cost("search", 23, 3680, 2.0 * 3560 * 3680),
        Cost("held-out check", 5, 240, 2.0 * 3560 * 240),
        Cost("experts alone", 2, 320, 2.0 * 3560 * 320),
        Cost("references", 3, 30_144, 6.0 * 3560 * 30_144),
    ]
    assert plan.search_flops == 6.0 * 3560 * 20_096 + 2.0 * 3560 * 3680
    full, climb, laws = plan.alternatives
    assert (full.runs, full.tokens, full.flops) == (10, 200_000, 6.0 * 3560 * 200_000)
    assert (climb.runs, climb.flops) == (112, pytest.approx(112 * 6 * 350e6 * 40e9))
    assert (laws.runs, laws.flops) == (40, pytest.approx(40 * 6 * 1e9 * 30e9))
    assert "MergeMix paper" in climb.source


def test_full_runs_are_left_out_while_their_length_is_unknown(mix: Path) -> None:
    plan = make_plan(mix, ["blend.train_tokens=null", "domains.code.max_epochs=null"])
    assert [row.what.split(",")[0] for row in plan.alternatives] == ["CLIMB", "scaling laws"]


def test_many_epochs_are_a_warning_that_names_run_and_dataset(mix: Path) -> None:
    assert make_plan(mix, ["experts.tokens=1e4"]).warnings == []
    math, code = make_plan(mix, ["experts.tokens=2e4"]).warnings
    assert math.startswith("experts/math passes 6.6 times over ")
    assert "/math_a; more than 4 passes teach less." in math
    assert code.startswith("experts/code passes 4.4 times over ")


def test_too_few_trials_for_the_surrogate_are_refused_before_anything_runs(mix: Path) -> None:
    with pytest.raises(ConfigError, match=r"to 3 mixtures; expected .*Raise search.trials"):
        make_plan(mix, ["search.trials=3", "search.surrogate=quadratic"])


def test_a_base_that_the_model_section_does_not_describe_is_a_warning(
    mix: Path, tmp_path: Path
) -> None:
    write_checkpoint(
        tmp_path / "base", {"embedding": torch.zeros(3559), "optimizer.m": torch.ones(9)}
    )
    plan = make_plan(mix, [f"base={{checkpoint: {tmp_path}/base}}"])
    assert plan.base_parameters == 3559
    assert plan.warnings == [
        "the model section describes 3,560 parameters, base.checkpoint holds 3,559; the section "
        "must describe the model that was saved."
    ]
    assert [run.name.split("/")[0] for run in plan.runs][:1] == ["experts"]


def test_given_experts_are_not_trained_again(mix: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "saved", {"embedding": torch.zeros(3560)})
    plan = make_plan(
        mix,
        [
            f"base={{checkpoint: {tmp_path}/saved}}",
            f"experts.checkpoints={{math: {tmp_path}/saved, code: {tmp_path}/saved}}",
            "experts.general_share=0.25",
        ],
    )
    assert [cost.what for cost in plan.costs] == [
        "search",
        "held-out check",
        "experts alone",
        "references",
    ]
    assert [domain.expert_epochs for domain in plan.domains] == [None, None]
    assert plan.warnings == []


def test_bounds_that_the_data_cannot_fill_are_refused(mix: Path) -> None:
    with pytest.raises(ConfigError, match="largest shares of the domains sum to"):
        make_plan(mix, ["domains.math.bounds=[0, 0.5]"])


def test_an_unknown_task_is_refused(mix: Path) -> None:
    settings = ["evaluate.capabilities.asked={lm_eval: {tasks: [tasks/mine.yaml]}}"]
    with pytest.raises(ConfigError, match="capability asked: .*there is no task file .*mine"):
        make_plan(mix, settings)


def test_metrics_without_a_common_direction_are_refused(mix: Path, tmp_path: Path) -> None:
    lm_eval_tasks.write(tmp_path / "tasks")
    files = [f"{tmp_path}/tasks/own_{name}.yaml" for name in ("choice", "rolling")]
    asked = f"evaluate.capabilities.asked={{lm_eval: {{tasks: [{', '.join(files)}]}}}}"
    with pytest.raises(ConfigError, match="mean of own_choice/acc .* own_rolling/bits_per_byte"):
        make_plan(mix, [asked, "model.seq_length=32"])


def test_missing_data_is_refused(mix: Path) -> None:
    (mix.parent / "code.bin").unlink()
    with pytest.raises(DataError, match=r"domains.code.prefixes: .*code.bin not found"):
        make_plan(mix)


# ---- settings only: the data are not there yet ----


@pytest.fixture
def unborn(mix: Path) -> Path:
    """The same experiment with nothing of it on disk but the YAML."""
    for file in mix.parent.iterdir():
        if file != mix:
            file.unlink()
    return mix


def test_settings_alone_give_runs_costs_and_memory(unborn: Path) -> None:
    plan = make_plan(unborn, settings_only=True)
    assert plan.costs == [
        Cost("base", 1, 1024, 6.0 * 3560 * 1024),
        Cost("experts", 2, 20_096, 6.0 * 3560 * 20_096),
        Cost("search", 23, 3680, 2.0 * 3560 * 3680),
        Cost("held-out check", 5, 240, 2.0 * 3560 * 240),
        Cost("experts alone", 2, 320, 2.0 * 3560 * 320),
        Cost("references", 3, 30_144, 6.0 * 3560 * 30_144),
    ]
    assert plan.runs[1] == RunPlan("experts/math", 157, 4, 10_048, None, None)
    assert plan.search_memory is not None
    assert "no dataset, tokenizer or checkpoint was opened" in plan.warnings[-1]


def test_a_search_of_which_nothing_is_counted_is_printed_without_a_comparison(
    unborn: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = "experts={checkpoints: {math: /nowhere/a, code: /nowhere/b}}"
    tasks = "evaluate.capabilities={a: {lm_eval: {tasks: [mmlu]}}}"
    words = ["plan", str(unborn), "--settings-only", "--set", given, "--set", tasks]
    assert main(words) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "this search:" in line)
    assert row.split()[-2:] == ["0.00e+00", "-"]


def test_settings_alone_tell_no_tokens_and_no_limit_that_depends_on_them(unborn: Path) -> None:
    math, code = make_plan(unborn, settings_only=True).domains
    assert (math.documents, math.train_tokens, math.proportional, math.high) == (None,) * 3 + (1.0,)
    assert (code.low, code.high) == (0.1, None)  # max_epochs may lower the bound of 0.9


def test_a_component_by_tokens_is_unknown_before_its_data_are_there(unborn: Path) -> None:
    rows = "experts.components={a: proportional, b: {math: 1.0}, c: uniform}"
    plan = make_plan(unborn, [rows], settings_only=True)
    assert plan.components == {
        "a": None,
        "b": {"math": 1.0, "code": 0.0},
        "c": {"math": 0.5, "code": 0.5},
    }
    assert plan.amplification is None
    known = make_plan(unborn, [rows.replace("proportional", "{code: 1.0}")], settings_only=True)
    assert known.amplification is not None


def test_experts_with_proportional_data_are_unknown_until_tokens_are(unborn: Path) -> None:
    known = make_plan(unborn, settings_only=True)
    assert known.components["math"] == pytest.approx({"math": 0.875, "code": 0.125})
    unknown = make_plan(unborn, ["experts.general_mixture=proportional"], settings_only=True)
    assert unknown.components == {"math": None, "code": None}
    assert unknown.costs == known.costs


def test_a_proportional_base_and_a_missing_checkpoint_are_no_matter_for_settings_alone(
    unborn: Path,
) -> None:
    proportional = make_plan(unborn, ["base.train.mixture=proportional"], settings_only=True)
    assert (proportional.runs[0].steps, proportional.runs[0].epochs) == (16, None)
    given = make_plan(unborn, ["base={checkpoint: /nowhere}"], settings_only=True)
    assert (given.base_parameters, given.runs[0].name) == (None, "experts/math")


def test_settings_that_cannot_work_are_refused_without_data_too(unborn: Path) -> None:
    with pytest.raises(ConfigError, match=r"to 3 mixtures; expected .*Raise search.trials"):
        make_plan(unborn, ["search.trials=3", "search.surrogate=quadratic"], settings_only=True)


def test_settings_alone_need_a_model_and_its_vocabulary(unborn: Path) -> None:
    huggingface = "tokenizer={kind: huggingface, path: /nowhere}"
    with pytest.raises(ConfigError, match=r"expected its vocabulary in model.vocab_size"):
        make_plan(unborn, [huggingface], settings_only=True)
    plan = make_plan(unborn, [huggingface, "model.vocab_size=257"], settings_only=True)
    assert plan.parameters.total == 3560
    settings = yaml.safe_load(unborn.read_text())
    for section in ("model", "parallel", "training"):
        settings.pop(section, None)
    settings |= {"base": {"checkpoint": "/nowhere"}, "launch": {"kind": "command"}}
    unborn.write_text(yaml.safe_dump(settings, sort_keys=False))
    with pytest.raises(ConfigError, match=r"the size of the model is that of base.checkpoint"):
        make_plan(unborn, settings_only=True)


def test_settings_alone_are_printed_with_dashes_for_what_is_unknown(
    unborn: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", str(unborn), "--settings-only"]
    assert main([*arguments, "--set", "experts.general_mixture=proportional"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^ +code +- +- +- +- +0\.100 +- *$", out, re.M), out
    assert re.search(r"^ +code +- +- *$", out, re.M), out
    assert main([*arguments, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["domains"][0]["train_tokens"] is None
    assert record["costs"][1]["tokens"] == 20_096


# ---- printing ----


def test_the_json_holds_every_number(mix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(mix), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["run_dir"] == f"{mix.parent}/run"
    assert record["domains"][1]["prefixes"] == [
        {
            "prefix": f"{mix.parent}/code",
            "documents": 40,
            "tokens": 4000,
            "train_tokens": 4000,
        }
    ]
    assert record["parameters"] == {"total": 3560, "active": 3560}
    memory = record["training_memory"]
    assert memory["total"] == sum(memory[key] for key in memory if key != "total")
    assert set(record["amplification"]) == {"vertices", "uniform"}
    assert record["search_memory"]["base_and_experts"] == 3 * record["search_memory"]["live"]
    assert not (mix.parent / "run").exists()


def test_the_tables_show_what_a_reader_asks_for(
    mix: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(mix), "--set", "experts.tokens=2e4"]) == 0
    out = capsys.readouterr().out
    for text in (
        f"{mix.parent}/math_a",
        "general share 0.25",
        "references/learned",
        "CLIMB, 0.35B parameters",
        "base and experts",
        "3,560 parameters",
        "norm of merge weights (alpha), by which the noise of experts enters the search: at most "
        "1.03 (vertex of math), 0.73 at equal shares",
        "warning: experts/math passes 6.6 times",
    ):
        assert text in out


def test_components_are_shown_only_when_they_are_no_plain_domains(
    mix: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["plan", str(mix), "--set", "experts.general_share=0"])
    assert "what experts are trained on" not in capsys.readouterr().out


def test_components_of_ones_own_are_shown_by_their_names(
    mix: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["plan", str(mix), "--set", COMPONENTS])
    out = capsys.readouterr().out
    assert "what experts are trained on (experts.components)" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["algebra", "0.900", "0.100"] in rows
    assert any(row[:1] == ["experts/hack"] for row in rows)


def test_a_plan_needs_neither_torch_nor_megatron(mix: Path) -> None:
    code = "from megatron_mergemix.cli import main; sys.exit(main(sys.argv[1:]))"
    done = run_without(["torch", "megatron"], code, "plan", str(mix))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00K"), (5e9, "5.00B"), (1.25e12, "1.25T")],
)
def test_amounts_are_short(number: float, text: str) -> None:
    assert amount(number) == text


def test_bytes_are_binary() -> None:
    assert (binary(3 * 2**29), binary(2**19)) == ("1.50 GiB", "0.50 MiB")


def test_a_launch_of_megatron_brings_the_model(mix: Path, tmp_path: Path) -> None:
    path = mix
    settings = yaml.safe_load(path.read_text())
    for section in ("model", "parallel", "training"):
        settings.pop(section, None)
    write_checkpoint(tmp_path / "given" / "iter_0000001", {"decoder.weight": torch.ones(10, 3)})
    settings |= {
        "base": {"checkpoint": str(tmp_path / "given" / "iter_0000001")},
        "launch": {"kind": "command"},
        "experts": {"tokens": 1000.0},
    }
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    before = make_plan(path)
    assert (before.parameters.total, before.training_memory) == (30, None)
    assert [run.steps for run in before.runs] == [None] * len(before.runs)
    assert [cost.what for cost in before.costs] == ["experts", "references"]

    training = {"training": {"save_interval": 5}}
    launched = ModelFacts(seq_length=16, global_batch_size=4, scoring={}, training=training)
    record_launch(load_config(path).model_copy(update={"launched": launched}))
    after = make_plan(path)
    assert [run.steps for run in after.runs] == [16] * len(after.runs)  # 1000 / 64, rounded up
    assert after.costs[0].flops == 6 * 30 * 2 * 1024
    costs = ["experts", "search", "held-out check", "experts alone", "references"]
    assert [cost.what for cost in after.costs] == costs


def test_what_a_command_takes_is_not_in_the_cost_and_is_said(mix: Path) -> None:
    run = "{run: 'eval {checkpoint} {output}', metrics: [a], timeout: 36}"
    changes = [f"evaluate.capabilities.own={{command: {run}}}", "evaluate.held_out=0"]
    plan = make_plan(mix, changes)
    assert [cost.tokens for cost in plan.costs if cost.what == "search"] == [3680]
    assert not any(cost.what == "held-out check" for cost in plan.costs)
    (warning,) = [each for each in plan.warnings if each.startswith("commands come on top")]
    assert "own, for 25 models" in warning, "23 of the search, and both experts alone"
    assert "at most 0.25 hours" in warning
