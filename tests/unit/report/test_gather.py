"""What is read of a run directory, and what is said when something is not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_mergemix.config import ModelFacts, load_config
from megatron_mergemix.diagnosis.record import diagnosed_settings
from megatron_mergemix.errors import ConfigError, SearchError
from megatron_mergemix.experiment.digests import of_checkpoints
from megatron_mergemix.files.publishing import publish_json
from megatron_mergemix.mixtures.simplex import to_vector
from megatron_mergemix.report.content import reference_points, sections_of
from megatron_mergemix.report.costs import measured_table, planned_table
from megatron_mergemix.report.gather import Run, blend_line, models, read_run
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.search.verdict import trial_of
from megatron_mergemix.trials import record_of
from tests.support.searched import run_trials, searched, write_settings


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> RunDir:
    """Return a copy of the run directory that a test may change."""
    shutil.copytree(finished.parent / "run", tmp_path / "moved")
    return RunDir(tmp_path / "moved")


def test_a_run_directory_and_its_yaml_give_the_same_run(finished: Path, run: Run) -> None:
    by_folder = read_run(finished.parent / "run")
    assert by_folder.trials == run.trials
    assert by_folder.result == run.result
    assert run.missing == []


def test_models_are_the_base_the_domains_the_priors_and_the_learned_one(run: Run) -> None:
    assert run.result is not None
    found = {model.name: model for model in models(run)}
    assert list(found) == [
        *("base", "math alone", "code alone", "web alone"),
        *("uniform", "proportional", "learned"),
    ]
    assert found["learned"].mixture == pytest.approx(run.result["mixture"])
    assert found["math alone"].mixture == {"math": 1.0, "code": 0.0, "web": 0.0}


def test_without_a_general_share_a_domain_alone_is_its_expert(tmp_path: Path) -> None:
    path = write_settings(tmp_path, ["math", "code"], {"experts": {}})
    changes = ["experts.general_share=0", f"experts.checkpoints={_given(tmp_path)}"]
    config = load_config(path, changes)
    run_trials(config, stop_after=4)
    names = [model.name for model in models(read_run(RunDir(config.run_dir).root))]
    assert names[:3] == ["base", "expert math", "expert code"]


def _given(home: Path) -> dict[str, str]:
    return {name: str(home / "given" / name / "iter_0000001") for name in ("math", "code")}


def test_experts_that_were_evaluated_on_the_same_items_are_shown(run: Run, copy: RunDir) -> None:
    digests = {"checkpoint": run.digests["expert.code"], **run.digests}
    record = {"name": "expert code", "scores": record_of(run.trials[0].scores), "digests": digests}
    publish_json(copy.evaluate / "a.json", record)
    stale = {**record, "digests": {**digests, "evaluate.code-text": "other windows"}}
    stale["digests"]["checkpoint"] = run.digests["expert.math"]
    publish_json(copy.evaluate / "b.json", stale)
    assert [model.name for model in read_run(copy.root).evaluations] == ["expert code"]


def test_without_a_search_the_message_names_the_command(tmp_path: Path) -> None:
    path = write_settings(tmp_path, ["math", "code"])
    with pytest.raises(SearchError, match="no search in .*run yet.*mergemix run mix.yaml"):
        read_run(path)


def test_a_search_that_is_not_over_shows_its_trials_and_says_so(tmp_path: Path) -> None:
    path = write_settings(tmp_path, ["math", "code", "web"])
    run_trials(load_config(path), stop_after=9)
    run = read_run(path)
    assert len(run.trials) == 9
    assert run.result is None
    (sentence,) = run.missing
    assert "not over" in sentence
    sections = {section.key: section for section in sections_of(run)}
    assert len(sections["trials"].tables[0].rows) == 9
    assert sections["mixtures"].drawings
    assert "best trial so far" in sections["mixtures"].text[0]
    assert "no learned blend before the search is over" in sections["blend"].missing[0]


def test_two_trials_are_too_few_for_anything_but_a_table(tmp_path: Path) -> None:
    path = write_settings(tmp_path, ["math", "code", "web"])
    run_trials(load_config(path), stop_after=2)
    run = read_run(path)
    assert run.scale is None
    assert any("no utilities" in sentence for sentence in run.missing)
    sections = {section.key: section for section in sections_of(run)}
    assert "No surface is drawn" in sections["mixtures"].missing[0]
    assert len(sections["trials"].tables[0].rows) == 2


def test_a_result_of_another_search_is_not_shown(copy: RunDir) -> None:
    result = json.loads(copy.result.read_text())
    publish_json(copy.result, {**result, "digests": {**result["digests"], "base": "another"}})
    run = read_run(copy.root)
    assert run.result is None
    assert "belongs to another search" in run.missing[0]


def test_a_result_of_other_settings_is_not_shown(copy: RunDir) -> None:
    """As every verb writes the settings it was started with, also those that search nothing."""
    record = json.loads(copy.config.read_text())
    record["evaluate"]["utility"]["kind"] = "worst"
    publish_json(copy.config, record)
    run = read_run(copy.root)
    assert run.result is None
    assert "what differs: utility" in run.missing[0]


def test_a_result_of_other_bounds_is_not_shown(copy: RunDir) -> None:
    record = json.loads(copy.config.read_text())
    record["domains"]["web"]["bounds"] = [0.0, 0.1]
    publish_json(copy.config, record)
    assert "what differs: bounds" in read_run(copy.root).missing[0]


def diagnosed(run: Run) -> dict[str, Any]:
    """Return what matters here of a diagnosis of this search."""
    assert run.result is not None
    gap = {"uniform": 0.1, "learned": 0.2}
    return {
        "digests": {**of_checkpoints(run.digests), **diagnosed_settings(run.config)},
        "learned": run.result["mixture"],
        "applied_norm": {"uniform": 1.0, "learned": 2.0},
        "curvature": {"math": {"gap": gap}, "web-text": {"gap": None}},
    }


@pytest.mark.parametrize("name", ["expert.web", "loss.web", "component.web"])
def test_a_diagnosis_counts_for_its_own_experts_and_losses_alone(
    run: Run, copy: RunDir, name: str
) -> None:
    record = diagnosed(run)
    publish_json(copy.diagnosis, record)
    assert read_run(copy.root).diagnosis == record
    assert read_run(copy.root).missing == []
    publish_json(copy.diagnosis, {**record, "digests": {**record["digests"], name: "another"}})
    stale = read_run(copy.root)
    assert stale.diagnosis is None
    assert "diagnosis is of other experts" in stale.missing[0]


def test_a_diagnosis_says_nothing_of_a_mixture_that_was_learned_later(
    run: Run, copy: RunDir
) -> None:
    other = {"math": 1.0, "code": 0.0, "web": 0.0}
    publish_json(copy.diagnosis, {**diagnosed(run), "learned": other})
    found = read_run(copy.root)
    assert found.diagnosis is not None
    assert found.diagnosis["curvature"]["math"]["gap"] == {"uniform": 0.1, "learned": None}
    assert found.diagnosis["applied_norm"] == {"uniform": 1.0, "learned": None}
    assert "`mergemix diagnose mix.yaml` again" in found.missing[0]


def test_the_line_for_megatron_is_of_this_search(copy: RunDir) -> None:
    assert blend_line(read_run(copy.root)).startswith("--data-path ")
    path = copy.blend / "blend.yaml"
    written = yaml.safe_load(path.read_text())
    written["provenance"]["digests"]["search.seed"] = "7"
    path.write_text(yaml.safe_dump(written))
    run = read_run(copy.root)
    assert blend_line(run) == ""
    (blend,) = [section for section in sections_of(run) if section.key == "blend"]
    assert blend.code == ""
    assert "not written yet for this search" in blend.missing[0]


def test_settings_that_were_moved_find_the_launch_beside_them(copy: RunDir) -> None:
    record = json.loads(copy.config.read_text())
    record |= {"model": None, "launch": {"kind": "command"}, "run_dir": "/not/here"}
    publish_json(copy.config, record)
    facts = ModelFacts(seq_length=8, global_batch_size=1, scoring={}, training={})
    publish_json(copy.launch, facts.model_dump(mode="json"))
    assert read_run(copy.root).config.launched == facts


def test_a_vertex_within_bounds_is_no_domain_alone(run: Run) -> None:
    trials = [
        replace(t, mixture={"math": 0.8, "code": 0.1, "web": 0.1}) if t.mixture["math"] == 1 else t
        for t in run.scored
    ]
    names = [model.name for model in models(replace(run, trials=trials))]
    assert names[:2] == ["code alone", "web alone"]
    assert "math alone" not in names


def test_a_domain_that_is_measured_twice_is_one_model(run: Run) -> None:
    again = [replace(t, index=100 + t.index) for t in run.scored if t.purpose == "vertex"]
    names = [model.name for model in models(replace(run, trials=[*run.trials, *again]))]
    assert names.count("math alone") == 1


def test_time_is_read_of_runs_and_not_of_the_locks_beside_them(copy: RunDir) -> None:
    (copy.root / "experts").mkdir(exist_ok=True)
    (copy.root / "experts" / "math.lock").touch()
    finished = {"steps": 2, "tokens": 512, "loss": 1.0, "seconds": 7.5}
    publish_json(copy.expert("math") / "finished.json", finished)
    rows = {row[0]: row for row in measured_table(read_run(copy.root)).rows}
    assert rows["experts/math"][2:] == [512, 7.5]


def test_a_damaged_record_of_training_is_named(copy: RunDir) -> None:
    path = copy.expert("math") / "finished.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(SearchError, match="cannot read .*experts/math/finished.json"):
        measured_table(read_run(copy.root))


def test_settings_that_are_gone_are_named(copy: RunDir) -> None:
    copy.config.unlink()
    with pytest.raises(ConfigError, match="config.json is missing"):
        read_run(copy.root)


def test_settings_of_other_trials_are_refused(copy: RunDir) -> None:
    record = json.loads(copy.config.read_text())
    record["evaluate"]["capabilities"]["more"] = record["evaluate"]["capabilities"]["math-text"]
    publish_json(copy.config, record)
    with pytest.raises(SearchError, match="the capabilities .*more.*changed after the search"):
        read_run(copy.root)


def test_a_report_needs_no_checkpoints_and_says_where_datasets_are_gone(tmp_path: Path) -> None:
    searched(tmp_path / "home", ["math", "code"])
    shutil.rmtree(tmp_path / "home" / "given")
    run = read_run(tmp_path / "home" / "run")
    assert run.tokens is not None
    assert not isinstance(planned_table(run), str)  # by the settings, without checkpoints
    (tmp_path / "home" / "math.bin").unlink()
    run = read_run(tmp_path / "home" / "run")
    assert run.tokens is None
    (sentence,) = run.missing
    assert sentence.startswith("Tokens and epochs of the domains are not known")
    sections = {section.key: section for section in sections_of(run)}
    assert sections["mixtures"].drawings
    assert sections["costs"].tables[0].key == "costs"  # planned by the settings alone


ROW: Mapping[str, Any] = {"behind": 0.0, "behind_stderr": 0.0, "scores": {}}


def test_references_of_this_search_are_set_against_their_proxies(run: Run, copy: RunDir) -> None:
    assert run.result is not None
    row = {"name": "learned", "mixture": run.result["mixture"], "utility": 0.5, **ROW}
    row |= {"proxy": {"utility": 0.25, "scores": {}}, "predicted": None}
    record = {"references": [row], "fidelity": None, "digests": run.result["digests"]}
    publish_json(copy.validation, record)
    found = read_run(copy.root)
    assert reference_points(found) == [("learned", 0.25, 0.5)]
    assert found.missing == []
    # Of another search, and as two older versions wrote it.
    stale = {**record, "digests": {**run.result["digests"], "utility": "another"}}
    for unknown in (stale, {"references": [row], "fidelity": None}, [row]):
        publish_json(copy.validation, unknown)
        found = read_run(copy.root)
        assert found.validation is None
        assert "is not known to belong to this search" in found.missing[0]


def test_the_learned_model_is_the_trial_of_the_winner(run: Run) -> None:
    assert run.result is not None
    winner = trial_of(to_vector(run.result["mixture"], run.domains), run.scored, run.domains)
    assert winner is not None
    assert winner.index == run.result["alternatives"][run.result["source"]]["trial"]
