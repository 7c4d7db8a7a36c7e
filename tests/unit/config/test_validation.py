"""References that ``validation.space_filling`` adds when the YAML is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_mergemix.config import Config, load_config
from megatron_mergemix.config.validation import how_to_leave_out
from megatron_mergemix.errors import ConfigError
from megatron_mergemix.mixtures.simplex import mixture_bounds, to_vector, within
from megatron_mergemix.plan.make import make_plan
from tests.support.untrained import write_config

NAMED = ["learned", "uniform", "proportional"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_config(tmp_path)


def filled(path: Path, num: int, *overrides: str) -> Config:
    return load_config(path, [f"validation.space_filling={num}", *overrides])


def test_without_the_section_the_references_are_the_named_ones(path: Path) -> None:
    assert list(load_config(path).references) == NAMED


def test_space_filling_references_come_after_the_named_ones(path: Path) -> None:
    config = filled(path, 12, "domains.web.bounds=[0.1, 0.4]", "search.min_share=0.05")
    assert list(config.references) == [*NAMED, *(f"filling-{n:02d}" for n in range(1, 13))]
    bounds = mixture_bounds(config.domains, {}, floor=0.05)
    for name in list(config.references)[3:]:
        mixture = config.references[name]
        assert isinstance(mixture, dict)
        assert within(to_vector(mixture, list(config.domains)), bounds)


def test_learned_uniform_and_proportional_are_always_among_them(path: Path) -> None:
    config = filled(path, 2, "references={even: uniform}")
    assert list(config.references) == [
        "even",
        "learned",
        "proportional",
        "filling-01",
        "filling-02",
    ]


def test_what_is_on_record_loads_as_the_same_experiment(path: Path, tmp_path: Path) -> None:
    config = filled(path, 5)
    record = tmp_path / "config.json"
    record.write_text(json.dumps(config.model_dump(mode="json")))
    assert load_config(record) == config
    assert Config.model_validate_json(record.read_text()) == config


def test_the_last_bits_of_another_machine_stay_as_they_are_on_record(
    path: Path, tmp_path: Path
) -> None:
    settings = filled(path, 2).model_dump(mode="json")
    rounded = {
        name: round(share, 9) for name, share in settings["references"]["filling-01"].items()
    }
    settings["references"]["filling-01"] = rounded
    record = tmp_path / "config.json"
    record.write_text(json.dumps(settings))
    assert load_config(record).references["filling-01"] == rounded


def test_neither_more_of_them_nor_another_reference_changes_those_there_are(path: Path) -> None:
    few = filled(path, 4).references
    many = filled(path, 9, "references.mine={math: 0.5, code: 0.5}").references
    assert {name: many[name] for name in few} == few
    assert filled(path, 4, "validation.seed=1").references != few


def test_a_name_that_is_taken_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"filling-01 is a name that validation.space_filling: 1"):
        filled(path, 1, "references.filling-01={math: 1.0}")
    with pytest.raises(ConfigError, match=r"references.uniform is another mixture, but validation"):
        filled(path, 1, "references={uniform: {math: 1.0}}")
    assert load_config(path, ["references.filling-01={math: 1.0}"]).references["filling-01"]


def test_bounds_without_room_are_refused(path: Path) -> None:
    bounds = ["domains.math.bounds=[0.5, 0.5]", "domains.code.bounds=[0.3, 0.3]"]
    with pytest.raises(ConfigError, match=r"space_filling is 2, but .* room for 0 other mixtures"):
        filled(path, 2, *bounds)
    with pytest.raises(ConfigError, match=r"validation.space_filling is -1"):
        filled(path, -1)


def test_the_plan_counts_what_they_cost(path: Path) -> None:
    few, many = (make_plan(path, words) for words in ([], ["validation.space_filling=5"]))
    costs = [{cost.what: cost for cost in plan.costs}["references"] for plan in (few, many)]
    assert [cost.runs for cost in costs] == [3, 8]
    assert costs[1].flops / costs[0].flops == pytest.approx(8 / 3)
    assert [run.name for run in many.runs][-1] == "references/filling-05"


def test_where_references_are_too_few_to_rank_the_plan_says_so(path: Path) -> None:
    [note] = make_plan(path).notes
    assert note.startswith("mergemix validate: 3 references tell which of them is best")
    assert note.endswith("--set validation.space_filling=24 trains 24 more.")
    assert make_plan(path, ["references={}"]).notes == []
    assert make_plan(path, ["validation.space_filling=1"]).notes == []


# ---- left out ----


def test_what_is_left_out_is_no_reference_and_the_others_stay(path: Path, tmp_path: Path) -> None:
    every = filled(path, 4).references
    config = filled(path, 4, "validation.leave_out=[filling-02, uniform]")
    gone = {"filling-02", "uniform"}
    assert config.references == {n: mixture for n, mixture in every.items() if n not in gone}
    record = tmp_path / "config.json"
    record.write_text(json.dumps(config.model_dump(mode="json")))
    assert load_config(record) == config
    assert "uniform" not in load_config(path, ["validation.leave_out=[uniform]"]).references


def test_only_what_is_added_is_left_out(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"leave_out\[0\] is 'filling-05', .* Did you mean fill"):
        filled(path, 4, "validation.leave_out=[filling-05]")
    with pytest.raises(ConfigError, match=r"'mine', .* It is one of references: remove it there"):
        filled(path, 4, "references.mine={math: 1.0}", "validation.leave_out=[mine]")


def test_how_to_leave_out_says_where_a_reference_comes_from(path: Path) -> None:
    config = filled(path, 4, "references.mine={math: 1.0}", "validation.leave_out=[learned]")
    assert how_to_leave_out(config, ["filling-03", "mine"]).startswith(
        "set validation.leave_out=[learned, filling-03] and remove mine from references: nothing"
    )
    assert how_to_leave_out(config, ["mine"]).startswith("remove mine from references: nothing")
