"""Domains with children: what the YAML may say, and where its mistakes are found."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mergemix.config import Config, load_config
from megatron_mergemix.errors import ConfigError

YAML = """\
run_dir: run
model: {num_layers: 2, hidden_size: 8, num_attention_heads: 4}
base: {train: {tokens: 1e6, lr: 1e-3}}
domains:
  math:
    children:
      web_math: {prefixes: [m/web]}
      math_qa:
        prefixes: [m/qa]
        bounds: [0.1, 0.5]
    bounds: [0, 0.6]
  code: {prefixes: [code]}
  web:
    children: {books: {prefixes: [w/books]}, wiki: {prefixes: [w/wiki], max_epochs: 2}}
evaluate:
  capabilities:
    a: {loss: {prefixes: [held]}}
search: {hierarchy: top_down, trials: 12, group_trials: {math: 8}}
blend: {train_tokens: 1e9}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "mix.yaml"
    path.write_text(YAML)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).replace(str(path), "mix.yaml")


def replaced(path: Path, old: str, new: str) -> Path:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


def test_leaves_are_domains_and_groups_stand_beside_them(path: Path) -> None:
    config = load_config(path)
    assert list(config.domains) == ["web_math", "math_qa", "code", "books", "wiki"]
    assert config.domains["math_qa"].bounds == (0.1, 0.5)
    assert config.leaves_by_group() == {
        "math": ("web_math", "math_qa"),
        "code": ("code",),
        "web": ("books", "wiki"),
    }
    assert config.groups["math"].bounds == (0.0, 0.6)
    assert config.groups["web"].bounds == (0.0, 1.0)
    assert [config.search.trials_in_group(name) for name in ("math", "web")] == [8, 24]


def test_a_job_reads_back_the_settings_that_its_launcher_wrote(path: Path) -> None:
    config = load_config(path)
    assert Config.model_validate_json(config.model_dump_json()) == config


def test_an_override_reaches_a_child_by_its_path_in_the_yaml(path: Path) -> None:
    config = load_config(path, ["domains.math.children.web_math.bounds=[0, 0.3]"])
    assert config.domains["web_math"].bounds == (0.0, 0.3)


def test_without_children_nothing_is_grouped(path: Path) -> None:
    flat = "domains={math: {prefixes: [m]}, code: {prefixes: [c]}}"
    config = load_config(path, [flat, "search={trials: 12}"])
    assert config.groups == {}
    assert config.leaves_by_group() == {"math": ("math",), "code": ("code",)}


@pytest.mark.parametrize(
    ("old", "new", "where", "what"),
    [
        ("[m/qa]", "[]", "mix.yaml:9: domains.math.children.math_qa.prefixes", "is empty"),
        ("[0.1, 0.5]", "[0.1, x]", "mix.yaml:10: domains.math.children.math_qa.bounds[1]", "'x'"),
        ("[0.1, 0.5]", "[0.5, 0.1]", "mix.yaml:10: domains.math.children.math_qa.bounds", "first"),
        ("prefixes: [m/qa]", "prefix: [m/qa]", "mix.yaml:9: domains.math.children.math_qa.prefix",
         "Did you mean prefixes? Valid here: bounds, max_epochs, prefixes."),
        ("[m/qa]", "[w/wiki]", "mix.yaml:14: domains.web.children.wiki.prefixes",
         "which is in domains.math.children.math_qa too"),
        ("[held]", "[m/qa]", "mix.yaml:17: evaluate.capabilities.a.loss.prefixes",
         "which domains.math.children.math_qa trains on"),
        ("    bounds: [0, 0.6]", "    bound: [0, 0.6]", "mix.yaml:11: domains.math.bound",
         "Did you mean bounds? Valid here: bounds, children."),
        ("    bounds: [0, 0.6]", "    bounds: 3", "mix.yaml:11: domains.math.bounds", "is 3"),
        ("    bounds: [0, 0.6]", "    max_epochs: 3", "mix.yaml:11: domains.math.max_epochs",
         "at the children"),
        ("    bounds: [0, 0.6]", "    prefixes: [m]", "mix.yaml:5: domains.math", "both prefixes"),
        ("    bounds: [0, 0.6]", "    bounds: [0, 0.05]", "mix.yaml:11: domains.math.bounds",
         "its children together have at least 0.1 and at most 1.5"),
        ("  code: {prefixes: [code]}\n", "", "mix.yaml:4: domains", "have upper bounds of groups"),
        ("{prefixes: [m/web]}", "{children: {x: {prefixes: [x]}, y: {prefixes: [y]}}}",
         "mix.yaml:7: domains.math.children.web_math.children", "there are two levels"),
        ("code: {", "books: {", "mix.yaml:14: domains.web.children.books", "occurs twice"),
        ("math_qa:\n", "math:\n", "mix.yaml:8: domains.math.children.math", "occurs twice"),
        ("code: {", "leaves: {", "mix.yaml:12: domains.leaves", "one of its stages"),
        ("web_math: {", "web math: {", "mix.yaml:7: domains.math.children.web math", "usable name"),
        ("{math: 8}", "{maths: 8}", "mix.yaml:18: search.group_trials.maths",
         "names no group. Did you mean math? Known: math, web."),
        ("{math: 8}", "{math: 2}", "mix.yaml:18: search.group_trials.math",
         "expected at least 3 for math"),
        ("trials: 12", "trials: 3", "mix.yaml:18: search.trials", "expected at least 4"),
        ("hierarchy: top_down, ", "", "mix.yaml:18: search.group_trials", "group by group"),
        ("hierarchy: top_down, trials: 12, group_trials: {math: 8}", "trials: 12",
         "mix.yaml:11: domains.math.bounds", "needs search.hierarchy"),
        ("run_dir: run", "run_dir: run\ngroups: {m: 1}", "mix.yaml:2: groups", "is not a setting"),
        *(
            ("trials: 12", f"trials: 12, {setting}",
             f"mix.yaml:18: search.{setting.partition(':')[0]}", "works on all domains at once")
            for setting in ("min_share: 0.01", "kl: 0.1", "ensemble: true")
        ),
        ("trials: 12", "strategy: iterative, rounds: [8, 4]", "mix.yaml:18: search.rounds",
         "works on all domains at once"),
        ("trials: 12", "strategy: fixed, points: [{code: 1}]", "mix.yaml:18: search.points",
         "works on all domains at once"),
        ("trials: 12", "strategy: gradient", "mix.yaml:18: search.hierarchy",
         "moves all domains at once"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_where_it_stands(
    path: Path, old: str, new: str, where: str, what: str
) -> None:
    if what == "have upper bounds of groups":
        replaced(path, "children: {books", "bounds: [0, 0.3]\n    children: {books")
    message = refusal(replaced(path, old, new))
    assert where + " " in message
    assert what in message


@pytest.mark.parametrize("children", ["", "{}", "{one: {prefixes: [one]}}", "[a, b]"])
def test_a_group_needs_two_children(path: Path, children: str) -> None:
    old = "{books: {prefixes: [w/books]}, wiki: {prefixes: [w/wiki], max_epochs: 2}}"
    assert "mix.yaml:14: domains.web.children " in refusal(replaced(path, old, children))


def test_a_hierarchy_needs_children_and_two_groups(path: Path) -> None:
    flat = "domains={math: {prefixes: [m]}, code: {prefixes: [c]}}"
    message = refusal(path, flat, "search={hierarchy: bottom_up}")
    assert "search.hierarchy is bottom_up, but no domain has children" in message
    one = "domains={math: {children: {a: {prefixes: [a]}, b: {prefixes: [b]}}}}"
    message = refusal(path, one, "search={hierarchy: bottom_up}")
    assert "there is one group, expected at least 2" in message


def test_a_mistake_in_an_override_is_told_as_such(path: Path) -> None:
    message = refusal(path, "domains.math.children.web_math.bounds=3")
    assert message.startswith("--set domains.math.children.web_math.bounds: domains.math.children.")
