"""Rules that join several settings, one wrong configuration for each."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_mergemix.config import Config, load_config
from megatron_mergemix.config.checks import cross_field_problems
from tests.support.refusal import refusal

GOOD = """\
run_dir: runs/x
model: {num_layers: 4, hidden_size: 64, num_attention_heads: 4, seq_length: 128}
training: {global_batch_size: 8, micro_batch_size: 2}
base: {checkpoint: /ckpt/base}
domains:
  math: {prefixes: [/data/math]}
  code: {prefixes: [/data/code]}
  web: {prefixes: [/data/web]}
experts: {tokens: 1e6}
evaluate:
  capabilities:
    math: {loss: {prefixes: [/held/math]}}
    code: {loss: {prefixes: [/held/code]}}
"""


@pytest.fixture
def mix(tmp_path: Path) -> Path:
    path = tmp_path / "mix.yaml"
    path.write_text(GOOD)
    return path


def test_the_good_one_is_good(mix: Path) -> None:
    load_config(mix)


MOE = "model.num_moe_experts=4"
COMMANDS_ONLY = (
    "evaluate.capabilities={tests: {command: {run: 't {checkpoint} {output}', metrics: [m]}}}"
)
ROWS = "experts.components={a: {math: 1}, b: {code: 0.5, web: 0.5}, c: proportional, d: {web: 1.0}}"


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["base={}"], "base has neither, expected exactly one of checkpoint and train"),
        (["base.train={tokens: 1e6, lr: 1e-3}"], "base has both, expected exactly one of"),
        (["model=null"], "model is missing: the built-in trainer and search build the model"),
        (["domains.a b={prefixes: [/x]}"], "domains.a b is not a usable name, expected letters"),
        (["domains.a/b={prefixes: [/x]}"], "domains.a/b is not a usable name"),
        (["references.a/b=uniform"], "references.a/b is not a usable name"),
        (["domains={math: {prefixes: [/x]}}"], "domains has 1, expected at least 2 to mix"),
        (["evaluate.capabilities={}"], "evaluate.capabilities is empty, expected at least one"),
        (["tokenizer.kind=huggingface"], "tokenizer.path is missing: kind huggingface reads"),
        (["tokenizer.path=/t"], "tokenizer.path is '/t' but kind byte has no files"),
        (["model.vocab_size=256"], "model.vocab_size is 256, expected at least 257"),
        (
            ["domains.math.prefixes=[/data/web]"],
            "domains.web.prefixes has '/data/web', which is in domains.math too",
        ),
        (["domains.math.prefixes=[]"], "domains.math.prefixes is empty, expected at least one"),
        (["domains.math.prefixes=[/a, /a]"], "domains.math.prefixes has '/a' twice"),
        (["domains.math.prefixes=[/a b]"], "prefixes has '/a b', expected no blanks: Megatron"),
        (["domains.math.prefixes=['']"], "prefixes has '', expected no blanks"),
        (["domains.math.prefixes=[/a.bin]"], "has '/a.bin', expected the name without '.bin'"),
        (["domains.math.prefixes=['~/a']"], "has '~/a', expected a whole path: ~ is not expanded"),
        (["run_dir='~/runs'"], "run_dir is '~/runs', expected a whole path: ~ is not expanded"),
        (
            ["experts.checkpoints={math: '~/m', code: /c, web: /w}"],
            "experts.checkpoints.math is '~/m', expected a whole path",
        ),
        (["domains.math.prefixes={/a: 0}"], "prefixes./a is 0, expected a weight greater than 0"),
        (["domains.math.prefixes={/a: -1}"], "prefixes./a is -1, expected a weight greater than 0"),
        (
            ["evaluate.capabilities.math.loss.prefixes=[/data/web]"],
            "math.loss.prefixes has '/data/web', which domains.web trains on",
        ),
        (["evaluate.capabilities.math.loss.prefixes=[]"], "math.loss.prefixes is empty"),
        (["domains.math.bounds=[0.5, 0.2]"], "bounds is [0.5, 0.2], expected the least share"),
        (
            ["domains.math.bounds=[0.6, 1]", "domains.web.bounds=[0.6, 1]"],
            "domains have lower bounds that sum to 1.2, expected at most 1",
        ),
        (
            [f"domains.{name}.bounds=[0, 0.3]" for name in ("math", "code", "web")],
            "domains have upper bounds that sum to 0.9, expected at least 1",
        ),
        (["references.a={math: 0.5, wed: 0.5}"], "references.a.wed names no domain. Did you mean"),
        (
            ["references.a={math: 0.5, web: 0.47}"],
            "references.a has weights that sum to 0.97, expected 1",
        ),
        (["references.a={math: 1.5, web: -0.5}"], "references.a.web is -0.5, expected a share"),
        (["references.a={}"], "references.a has weights that sum to 0, expected 1"),
        (
            ["experts.general_mixture={math: 2}"],
            "experts.general_mixture has weights that sum to 2, expected 1",
        ),
        (
            ["base={train: {tokens: 1e6, lr: 1, mixture: {math: 0.1}}}"],
            "base.train.mixture has weights that sum to 0.1, expected 1",
        ),
        (
            ["experts.checkpoints={math: /m, code: /c}"],
            "experts.checkpoints lacks web; expected a checkpoint for every expert, or none",
        ),
        (
            ["experts.checkpoints={math: /m, code: /c, wep: /c, web: /w}"],
            "experts.checkpoints.wep names no expert. Did you mean web? Known: math, code, web.",
        ),
        (
            [ROWS, "experts.checkpoints={a: /a, b: /b, math: /c}"],
            "experts.checkpoints.math names no expert. Known: a, b, c, d.",
        ),
        (
            [ROWS, "experts.checkpoints={a: /a, b: /b}"],
            "experts.checkpoints lacks c, d; expected a checkpoint for every expert",
        ),
        (
            ["experts.components={a: {math: 1}, b: uniform}"],
            "experts.components has 2, expected at least 3, as many as there are domains",
        ),
        ([ROWS, "experts.components.a b=uniform"], "experts.components.a b is not a usable name"),
        (
            [ROWS, "experts.components.a={maths: 1}"],
            "experts.components.a.maths names no domain. Did you mean math?",
        ),
        (
            [ROWS, "experts.components.a={math: 0.5, code: 0.4}"],
            "experts.components.a has weights that sum to 0.9, expected 1",
        ),
        (
            [ROWS, "experts.components.a={math: 1.5, code: -0.5}"],
            "experts.components.a.code is -0.5, expected a share of at least 0",
        ),
        (
            [ROWS, "experts.components.a=learned"],
            "experts.components.a is 'learned', expected 'uniform' or 'proportional' or a mapping",
        ),
        (
            [ROWS, "experts.general_share=0.25"],
            "experts.general_share is given, but experts.components says what every expert",
        ),
        (
            [ROWS, "experts.general_mixture=uniform"],
            "experts.general_mixture is given, but experts.components says what every expert",
        ),
        (["experts.general_share=null"], "experts.general_share is nothing; leave it away"),
        (
            ["experts.warmup_steps=977"],
            "experts.warmup_steps is 977, expected less than the 977 steps that experts.tokens",
        ),
        (
            ["base={train: {tokens: 1e5, lr: 1, warmup_steps: 98}}"],
            "base.train.warmup_steps is 98, expected less than the 98 steps that base.train.tokens",
        ),
        (
            ["experts.average_last=3"],
            "experts.average_last is 3, but 977 steps with training.save_interval 500 make 2 saves",
        ),
        (
            ["evaluate.utility.weights={math: 1, cod: 1}"],
            "evaluate.utility.weights.cod names no capability. Did you mean code?",
        ),
        (["evaluate.utility.weights={math: 0, code: 0}"], "weights are all 0, expected at least"),
        (["evaluate.utility.weights={math: 1}"], "weights has none for code, expected one for"),
        (
            ["evaluate.utility={kind: worst, weights: {math: 2, code: 1}}"],
            "weights has others than 0 and 1, which evaluate.utility.kind: worst cannot use",
        ),
        (
            ["parallel={processes: 6, tensor: 2, pipeline: 2}"],
            "parallel.processes is 6, expected a multiple of 4 (tensor 2 x pipeline 2)",
        ),
        (
            [MOE, "parallel={processes: 4, tensor: 2, expert: 4}"],
            "parallel.expert is 4, expected a divisor of the 2 data-parallel ranks",
        ),
        (
            ["parallel.processes=3"],
            "training.global_batch_size is 8, expected a multiple of 6 "
            "(micro_batch_size 2 x 3 data-parallel ranks)",
        ),
        (["model.hidden_size=65"], "model.hidden_size is 65, expected a multiple of num_attention"),
        (["model.hidden_size=60"], "gives heads of 15 channels, expected an even number for rope"),
        (["model.num_query_groups=3"], "is 3, expected a divisor of num_attention_heads 4"),
        (
            ["model.num_attention_heads=2", "parallel={processes: 4, tensor: 4}"],
            "model.num_attention_heads is 2, expected a multiple of parallel.tensor 4",
        ),
        (
            [
                "model={num_layers: 4, hidden_size: 96, num_attention_heads: 12, "
                "num_query_groups: 3}",
                "parallel={processes: 2, tensor: 2}",
            ],
            "model.num_query_groups is 3, expected a multiple or a divisor of parallel.tensor 2",
        ),
        (
            ["parallel={processes: 3, pipeline: 3}"],
            "model.num_layers is 4, expected a multiple of parallel.pipeline 3",
        ),
        (
            ["model.ffn_hidden_size=33", "parallel={processes: 2, tensor: 2}"],
            "model.ffn_hidden_size is 33, expected a multiple of parallel.tensor 2",
        ),
        (
            ["model.make_vocab_size_divisible_by=37", "parallel={processes: 2, tensor: 2}"],
            "model.make_vocab_size_divisible_by is 37, which pads the vocabulary to 259 rows",
        ),
        (["model.num_moe_experts=4", "model.moe_top_k=5"], "moe_top_k is 5, expected at most"),
        (["model.moe_top_k=4"], "model.moe_top_k is given without num_moe_experts; leave it away"),
        (
            ["model.rotary_base=500000", "model.position_embedding=learned_absolute"],
            "model.rotary_base is given without position_embedding: rope; leave it away",
        ),
        (
            ["experts.general_share=0", "experts.general_mixture=proportional"],
            "experts.general_mixture is given, but experts.general_share is 0; leave one of them",
        ),
        (
            ["parallel={processes: 2, expert: 2}"],
            "parallel.expert is 2, but model.num_moe_experts is not set",
        ),
        (
            ["model.num_moe_experts=3", "parallel={processes: 2, expert: 2}"],
            "model.num_moe_experts is 3, expected a multiple of parallel.expert 2",
        ),
        (
            [MOE, "parallel={processes: 2, tensor: 2}"],
            "parallel.tensor is 2, expected 1 with model.num_moe_experts: Megatron wants sequence "
            "parallelism for MoE layers cut over tensor-parallel ranks, which the built-in trainer "
            "does not have. Use parallel.expert instead",
        ),
        (
            ["search.strategy=gradient", "search.trials=41"],
            "search.trials is given, but search.strategy: gradient measures its steps",
        ),
        (["search.steps=5"], "search.steps belongs to search.strategy: gradient"),
        (["search.first_share=0"], "search.first_share is 0"),
        (["search.first_share=1.5"], "search.first_share is 1.5"),
        (
            ["search={strategy: gradient, first_share: 0.5}"],
            "search.first_share is given, but search.strategy: gradient measures its steps on",
        ),
        (
            ["search={hierarchy: top_down, first_share: 0.5}"],
            "search.first_share is given, but with search.hierarchy stages share their trials",
        ),
        (
            [COMMANDS_ONLY, "search.first_share=0.5"],
            "search.first_share is given, but a command cannot be scored on a share of its items, "
            "and all that counts are commands (tests); leave it away",
        ),
        (
            ["search.strategy=gradient", "search.top_k=5"],
            "search.top_k belongs to search.strategy: mergemix or iterative",
        ),
        (["search.strategy=gradient", "search.minibatch=1.5"], "search.minibatch is 1.5"),
        (["search.trials=3"], "search.trials is 3, expected at least 4: every domain alone"),
        (
            ["domains.math.max_epochs=4"],
            "domains.math.max_epochs needs blend.train_tokens: epochs are counted over",
        ),
        (["blend.split=99;1"], "blend.split is '99;1', expected up to three numbers"),
        (["blend.split='0,1,1'"], "blend.split is '0,1,1', expected up to three numbers"),
        (["blend.split='97,1,1,1'"], "blend.split is '97,1,1,1', expected up to three numbers"),
        (["domains.math.prefixes=['1e2']"], "'1e2', which Megatron reads as an option or a weight"),
        (["domains.math.prefixes=[-x]"], "'-x', which Megatron reads as an option or a weight"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(
    mix: Path, overrides: list[str], text: str
) -> None:
    assert text in refusal(mix, *overrides)


LAUNCH_WITH_TASKS = [
    "model=null",
    "training={}",
    "launch.kind=command",
    "evaluate.capabilities.quiz={lm_eval: {tasks: [a.yaml]}}",
]


def test_tasks_of_a_launch_need_its_tokenizer_and_bytes_must_be_meant(mix: Path) -> None:
    message = refusal(mix, *LAUNCH_WITH_TASKS)
    assert "tokenizer is missing: the launch has its own, but tasks of lm-eval (quiz)" in message
    load_config(mix, [*LAUNCH_WITH_TASKS, "tokenizer.kind=byte"])
    load_config(mix, LAUNCH_WITH_TASKS[:3])
    load_config(mix, LAUNCH_WITH_TASKS[3:])


def test_of_training_a_launch_takes_the_interval_of_saves_and_nothing_silently(mix: Path) -> None:
    launch = LAUNCH_WITH_TASKS[:3]
    config = load_config(mix, [*launch, "training.save_interval=10"])
    assert config.training.save_interval == 10
    for setting in ("weight_decay=0.0", "global_batch_size=4", "adam_beta2=0.999"):
        message = refusal(mix, *launch, f"training.{setting}")
        name, _, value = setting.partition("=")
        assert f"training.{name} is {value}, but with launch.kind command it comes" in message
        assert "expected a multiple" not in message


def test_components_are_experts_with_names_of_their_own(mix: Path) -> None:
    config = load_config(mix, [ROWS, "experts.checkpoints={d: /d, a: /a, c: /c, b: /b}"])
    assert config.expert_names == ["a", "b", "c", "d"]
    assert (config.experts.general_share, config.experts.general_mixture) == (None, None)
    assert load_config(mix).expert_names == ["math", "code", "web"]


def test_an_experiment_with_components_is_the_same_from_its_record(mix: Path) -> None:
    """The record has every default, which must not look as if a user had given it."""
    config = load_config(mix, [ROWS])
    recorded = Config.model_validate_json(config.model_dump_json())
    assert recorded == config
    assert [each for each in cross_field_problems(recorded) if each.path[0] == "experts"] == []


def test_a_vocabulary_that_divides_after_padding_is_accepted(mix: Path) -> None:
    """257 padded to multiples of 43 is 258 rows, which two ranks can share."""
    load_config(
        mix, ["model.make_vocab_size_divisible_by=43", "parallel={processes: 2, tensor: 2}"]
    )


def test_a_prior_needs_no_share_of_a_domain_that_is_left_out(mix: Path) -> None:
    prior = ["search.kl=0.1", "search.prior={math: 0.5, code: 0.5}"]
    assert "has no share of web" in refusal(mix, *prior)
    load_config(mix, [*prior, "domains.web.bounds=[0.0, 0.0]"])


def test_mixtures_may_miss_the_sum_by_a_millionth(mix: Path) -> None:
    load_config(mix, ["references.a={math: 0.3333333, code: 0.3333333, web: 0.3333333}"])
    assert "sum to 0.99999, expected 1" in refusal(
        mix, "references.a={math: 0.33333, code: 0.33333, web: 0.33333}"
    )


def test_held_out_data_is_recognised_under_another_name(tmp_path: Path, mix: Path) -> None:
    (tmp_path / "data").mkdir()
    os.symlink(tmp_path / "data", tmp_path / "alias")
    assert "which domains.web trains on" in refusal(
        mix,
        f"domains.web.prefixes=[{tmp_path}/data/web]",
        f"evaluate.capabilities.math.loss.prefixes=[{tmp_path}/alias/x/../web]",
    )


def test_several_broken_rules_come_in_one_error_with_lines(tmp_path: Path) -> None:
    path = tmp_path / "mix.yaml"
    path.write_text(GOOD + "search: {trials: 2}\nblend: {split: '1,'}\n")
    assert refusal(path).replace(str(path), "mix.yaml").splitlines() == [
        "2 problems in the configuration:",
        "  mix.yaml:14: search.trials is 2, expected at least 4: every domain alone, and one "
        "mixture",
        "  mix.yaml:15: blend.split is '1,', expected up to three numbers for training, "
        "validation and test with some training, such as '99,1,0'",
    ]


RUN = "python eval.py {checkpoint} {output}"
COMMAND = f"evaluate.capabilities.own={{command: {{run: '{RUN}', metrics: [a]}}}}"


def test_a_command_is_a_capability_beside_losses(mix: Path) -> None:
    config = load_config(mix, [COMMAND, "evaluate.commands_at_once=2", "evaluate.scratch=/scratch"])
    assert list(config.evaluate.losses) == ["math", "code"]
    assert list(config.evaluate.commands) == ["own"]
    assert config.evaluate.commands["own"].run == ["python", "eval.py", "{checkpoint}", "{output}"]


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            ["evaluate.capabilities.own={}"],
            "own has none of them, expected exactly one of loss, lm_eval, command",
        ),
        (
            ["evaluate.capabilities.math.lm_eval={tasks: [x]}"],
            "math has loss and lm_eval, expected exactly one of",
        ),
        (["evaluate.capabilities.own={comand: {}}"], "Did you mean command"),
        (["evaluate.capabilities.own={lm_eval: {tasks: []}}"], "lm_eval.tasks is empty"),
        ([COMMAND, "evaluate.capabilities.own.command.run=''"], "own.command.run is empty"),
        (
            [COMMAND, "evaluate.capabilities.own.command.run='eval {chekpoint} {output}'"],
            "run has no {checkpoint}, which the program needs; {chekpoint} is not replaced",
        ),
        ([COMMAND, "evaluate.capabilities.own.command.run='a {checkpoint}'"], "has no {output}"),
        (
            [COMMAND, "evaluate.capabilities.own.command.run='$X {checkpoint} {output}'"],
            "no shell reads the words of a command",
        ),
        ([COMMAND, "evaluate.capabilities.own.command.metrics=[]"], "metrics is empty"),
        ([COMMAND, "evaluate.capabilities.own.command.metrics=[a, a]"], "has a metric twice"),
        (
            [COMMAND, "evaluate.capabilities.own.command={stderr: e, metrics: [a, b], run: x}"],
            "stderr is 'e', but there are 2 metrics",
        ),
        (
            [COMMAND, "evaluate.capabilities.own.command={stderr: a, metrics: [a], run: x}"],
            "stderr is 'a', which is the metric itself",
        ),
        (
            [COMMAND, "search.strategy=gradient", "search.trials=40"],
            "needs held-out losses, but own",
        ),
        ([COMMAND, "search.ensemble=true"], "search.ensemble is true, which needs held-out losses"),
        ([COMMAND, "search.replicas=candidates"], "commands score one candidate at a time (own)"),
        (["evaluate.commands_at_once=2"], "is given, but no capability is a command"),
        (["evaluate.scratch=/x"], "is given, but no capability is a command"),
        ([COMMAND, "evaluate.scratch=~/x"], "~ is not expanded"),
        (["evaluate.held_out=1.0"], "evaluate.held_out is 1.0, expected a number less than 1"),
    ],
)
def test_wrong_capabilities_are_refused(mix: Path, overrides: list[str], text: str) -> None:
    assert text in refusal(mix, *overrides)


def test_a_capability_of_no_kind_is_found_at_its_line(mix: Path) -> None:
    mix.write_text(GOOD + "    own: {}\n")
    assert f"mix.yaml:{GOOD.count(chr(10)) + 1}: evaluate.capabilities.own has none" in refusal(mix)


@pytest.mark.parametrize("setting", ["search.ensemble=true", "search.strategy=gradient"])
def test_a_command_that_does_not_count_leaves_losses_alone(mix: Path, setting: str) -> None:
    load_config(mix, [COMMAND, setting, "evaluate.utility.weights={math: 1, code: 1, own: 0}"])
