"""Loading mix.yaml: what is accepted, and what each mistake is answered with."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mergemix.config import Config, load_config
from tests.support.refusal import refusal

GOOD = """\
run_dir: runs/x
model: {num_layers: 2, hidden_size: 64, num_attention_heads: 4, seq_length: 128}
base:
  checkpoint: /ckpt/base
domains:
  math: {prefixes: [/data/math_web, /data/math_qa]}
  code:
    prefixes: {/data/repos: 2, /data/notebooks: 1}
evaluate:
  capabilities:
    math:
      loss: {prefixes: [/held/math]}
    code: {loss: {prefixes: [/held/code]}}
"""


@pytest.fixture
def mix(tmp_path: Path) -> Path:
    path = tmp_path / "mix.yaml"
    path.write_text(GOOD)
    return path


def refusal_of(tmp_path: Path, text: str) -> str:
    path = tmp_path / "other.yaml"
    path.write_text(text)
    return refusal(path).replace(str(path), "other.yaml")


def test_a_good_file_becomes_typed_settings_with_defaults(mix: Path) -> None:
    config = load_config(mix)
    assert config.run_dir == Path("runs/x")
    assert config.domains["math"].prefixes == ["/data/math_web", "/data/math_qa"]
    assert config.domains["code"].prefixes == {"/data/repos": 2.0, "/data/notebooks": 1.0}
    assert config.experts.tokens == 5e9
    assert list(config.domains) == ["math", "code"]


def test_every_setting_is_documented() -> None:
    """The missing-key message and the docs live on the descriptions of the fields."""
    models, undocumented = [Config], []
    while models:
        model = models.pop()
        for name, field in model.model_fields.items():
            nested = getattr(field.annotation, "model_fields", None)
            if nested is not None:
                models.append(field.annotation)
            elif field.is_required() and not field.description and model is not Config:
                undocumented.append(f"{model.__name__}.{name}")
    assert undocumented == ["Evaluate.capabilities"]


# ---- YAML ----


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e9", 5e9),
        ("5E9", 5e9),
        ("2e-4", 2e-4),
        ("1.5e+3", 1500.0),
        (".5e3", 500.0),
        ("5_000_000", 5e6),
        ("7", 7.0),
        ("010", 10.0),
        ("0x10", 16.0),
    ],
)
def test_numbers_are_numbers_however_they_are_written(mix: Path, text: str, value: float) -> None:
    config = load_config(mix, [f"experts.tokens={text}"])
    assert config.experts.tokens == value
    assert type(config.experts.tokens) is float


@pytest.mark.parametrize("name", ["no", "on", "yes", "off", "y", "null_", "true_"])
def test_words_that_yaml_1_1_reads_as_booleans_are_usable_names(mix: Path, name: str) -> None:
    config = load_config(mix, [f"domains={{{name}: {{prefixes: [a]}}, b: {{prefixes: [c]}}}}"])
    assert list(config.domains) == [name, "b"]


def test_a_key_that_occurs_twice_is_an_error_with_both_lines(tmp_path: Path) -> None:
    text = GOOD + "blend:\n  train_tokens: 5\n  train_tokens: 6\n"
    assert refusal_of(tmp_path, text) == (
        "other.yaml:15: blend.train_tokens occurs twice, on lines 15 and 16; keep one"
    )


def test_a_domain_that_occurs_twice_is_an_error(tmp_path: Path) -> None:
    text = GOOD.replace("  code:\n", "  math:\n", 1)
    assert "other.yaml:6: domains.math occurs twice, on lines 6 and 7" in refusal_of(tmp_path, text)


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    path = tmp_path / "mix.yaml"
    path.write_text(
        GOOD.replace("/held/math]}", "/held/math], <<: *fixed}").replace(
            "run_dir: runs/x", "run_dir: runs/x\nsearch: &fixed {}"
        )
    )
    assert load_config(path).evaluate.capabilities["math"].loss.prefixes == ["/held/math"]


def test_broken_yaml_names_the_line(tmp_path: Path) -> None:
    message = refusal_of(tmp_path, GOOD + "search: {trials: 4\n")
    assert message.startswith("other.yaml:15: not valid YAML: ")


def test_a_value_that_contains_itself_is_an_error(tmp_path: Path) -> None:
    assert "contains itself" in refusal_of(tmp_path, "a: &a [*a]\n")


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['true']", "!!python/name:os"])
def test_yaml_cannot_run_code(tmp_path: Path, text: str) -> None:
    assert "not valid YAML: could not determine a constructor" in refusal_of(
        tmp_path, f"run_dir: {text}\n"
    )


def test_an_empty_file_says_how_to_start(tmp_path: Path) -> None:
    message = refusal_of(tmp_path, "# nothing\n")
    assert message.startswith("other.yaml is empty; expected a mapping of settings. `mergemix init")


def test_a_list_is_not_a_configuration(tmp_path: Path) -> None:
    assert "holds [1, 2]; expected a mapping" in refusal_of(tmp_path, "[1, 2]")


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.yaml").endswith("none.yaml: No such file or directory")


def test_a_folder_is_an_error(tmp_path: Path) -> None:
    assert refusal(tmp_path).endswith(": Is a directory")


def test_a_file_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_bytes(b"run_dir: \xff\n")
    assert refusal(tmp_path / "mix.yaml").endswith("is not UTF-8 text (byte 9)")


# ---- structure ----


def test_an_unknown_key_names_the_nearest_valid_key_and_the_line(tmp_path: Path) -> None:
    message = refusal_of(tmp_path, GOOD + "search: {trails: 64}\n")
    assert message == (
        "other.yaml:14: search.trails is not a setting. Did you mean trials? "
        "Valid here: batch, ensemble, failures, first_share, group_trials, hierarchy, kl, "
        "min_share, minibatch, points, prior, replicas, resident, rounds, sampler, seed, "
        "step_length, steps, strategy, surrogate, top_k, trials."
    )


def test_a_key_in_the_wrong_section_is_found_elsewhere(mix: Path) -> None:
    assert "trials is not a setting. Did you mean search.trials?" in refusal(mix, "trials=64")


def test_an_unknown_key_of_a_domain_names_the_nearest(mix: Path) -> None:
    assert (
        "domains.math.max_epoch is not a setting. Did you mean max_epochs? "
        "Valid here: bounds, max_epochs, prefixes."
    ) in refusal(mix, "domains.math.max_epoch=4")


def test_a_missing_key_says_what_it_is_for(mix: Path) -> None:
    message = refusal(mix, "domains.web={}")
    assert (
        "domains.web.prefixes is missing: Megatron dataset prefixes (without .bin/.idx); a mapping "
        "gives each its weight within the domain, a list weighs them by tokens."
    ) in message


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("search.trials=true", "search.trials is true, expected a whole number"),
        ("search.trials=4.0", "search.trials is 4.0, expected a whole number"),
        ("search.trials='4'", "search.trials is '4', expected a whole number; remove the quotes"),
        ("search.trials=0", "search.trials is 0, expected a number greater than 0"),
        ("search.trials=", "search.trials is nothing, expected a whole number"),
        ("experts.tokens=true", "experts.tokens is true, expected a number"),
        ("experts.tokens='5e9'", "is '5e9', expected a number; remove the quotes"),
        ("experts.tokens=5G", "experts.tokens is '5G', expected a number"),
        ("experts.lr=.inf", "experts.lr is inf, expected a finite number"),
        ("experts.lr=.nan", "experts.lr is nan, expected a finite number"),
        ("experts.general_share=1", "is 1, expected a number less than 1"),
        ("training.adam_beta2=1.5", "is 1.5, expected a number of at most 1"),
        ("training.weight_decay=-1", "is -1, expected a number of at least 0"),
        ("model.tie_embeddings=1", "model.tie_embeddings is 1, expected true or false"),
        ("model.tie_embeddings=no", "is 'no', expected true or false; write false"),
        ("model.precision=fp61", "model.precision is 'fp61', expected 'fp32' or 'bf16'"),
        ("model.activation=swigul", "expected 'swiglu' or 'gelu'. Did you mean swiglu?"),
        ("run_dir=3", "run_dir is 3, expected a path"),
        ("tokenizer=byte", "tokenizer is 'byte', expected a mapping of settings"),
        ("domains=[a]", "domains is ['a'], expected a mapping"),
        ("domains.math.prefixes=3", "prefixes is 3, expected a list or a mapping"),
        ("domains.math.prefixes=[a, 3]", "prefixes[1] is 3, expected text: write it in quotes"),
        ("domains.math.prefixes={a: x}", "domains.math.prefixes.a is 'x', expected a number"),
        ("domains.math.bounds=[0.1]", "bounds is [0.1], expected a list of two numbers"),
        ("domains.math.bounds=[0, 1, 1]", "is [0, 1, 1], expected a list of two numbers"),
        ("domains.math.bounds=[0, 1.5]", "bounds[1] is 1.5, expected a number of at most 1"),
        ("domains.math.bounds=[0, true]", "bounds[1] is true, expected a number"),
        ("domains={1: {prefixes: [a]}}", "domains.1 is the key 1, expected text: write the key"),
        ("domains={null: {prefixes: [a]}}", "domains.None is the key nothing, expected text"),
        (
            "experts.general_mixture=unifrom",
            "is 'unifrom', expected 'uniform' or 'proportional' or a mapping. "
            "Did you mean uniform?",
        ),
        ("references.a={math: true, code: 0}", "references.a.math is true, expected a number"),
    ],
)
def test_a_wrong_value_is_shown_with_what_was_expected(mix: Path, override: str, text: str) -> None:
    message = refusal(mix, override)
    assert text in message
    assert "\n" not in message


def test_all_problems_come_at_once_with_their_lines(tmp_path: Path) -> None:
    text = GOOD.replace("num_layers: 2", "num_layers: two").replace("  checkpoint", "  chekpoint")
    assert refusal_of(tmp_path, text).splitlines() == [
        "2 problems in the configuration:",
        "  other.yaml:2: model.num_layers is 'two', expected a whole number",
        "  other.yaml:4: base.chekpoint is not a setting. Did you mean checkpoint? "
        "Valid here: checkpoint, train.",
    ]


def test_more_than_eight_problems_are_counted(mix: Path) -> None:
    lines = refusal(mix, *(f"search.x{i}=1" for i in range(11))).splitlines()
    assert lines[0] == "11 problems in the configuration:"
    assert len(lines) == 10
    assert lines[-1] == "  and 3 more"


def test_a_problem_of_a_whole_section_stands_on_the_line_of_the_section(tmp_path: Path) -> None:
    text = GOOD.replace("    prefixes: {/data/repos: 2, /data/notebooks: 1}", "    max_epochs: 2")
    assert "other.yaml:7: domains.code.prefixes is missing" in refusal_of(tmp_path, text)


# ---- overrides ----


def test_overrides_win_over_the_file_and_the_last_one_wins(mix: Path) -> None:
    config = load_config(mix, ["model.num_layers=4", "model.num_layers=8", "experts.lr=1e-3"])
    assert config.model is not None
    assert config.model.num_layers == 8
    assert config.experts.lr == 1e-3


def test_overrides_make_missing_sections_and_read_yaml(mix: Path) -> None:
    config = load_config(mix, ["references.half={math: 0.5, code: 0.5}", "blend.split='98,2,0'"])
    assert config.references == {"half": {"math": 0.5, "code": 0.5}}
    assert config.blend.split == "98,2,0"


def test_the_place_of_a_wrong_override_is_the_override(mix: Path) -> None:
    assert refusal(mix, "model={num_layers: 0, hidden_size: 4, num_attention_heads: 1}") == (
        "--set model: model.num_layers is 0, expected a number greater than 0"
    )


@pytest.mark.parametrize("override", ["search.trials", "=3", "a..b=3", ".a=3"])
def test_an_override_without_key_or_value_is_an_error(mix: Path, override: str) -> None:
    assert refusal(mix, override) == (
        f"--set {override}: expected key=value, such as search.trials=64"
    )


def test_an_override_cannot_lead_through_a_plain_value(mix: Path) -> None:
    assert refusal(mix, "run_dir.x=3").startswith(
        "--set run_dir.x=3: run_dir is 'runs/x', not a mapping"
    )


def test_an_override_that_is_not_yaml_is_an_error(mix: Path) -> None:
    assert refusal(mix, "search={trials").startswith("--set search={trials:1: not valid YAML")
