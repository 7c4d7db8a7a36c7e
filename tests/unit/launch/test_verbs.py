"""What the verbs start, in which order, and what they leave alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_mergemix.config import Config, load_config
from megatron_mergemix.errors import ConfigError, DataError, MergeMixError, SearchError
from megatron_mergemix.launch import verbs
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.training_runs.experiment_runs import base_run
from tests.support import lm_eval_tasks
from tests.support.finished import finish_references, finish_search, losses
from tests.support.launch import write_launch
from tests.support.torch_dist import write_checkpoint
from tests.support.untrained import with_base, with_experts, write_config

EXPERTS = ["experts/math", "experts/code", "experts/web"]


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    return write_config(tmp_path)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["base"], ["base"]),
        (["experts"], EXPERTS),
        (["expert:code"], ["experts/code"]),
        (["experts", "base"], ["base", *EXPERTS]),
        (["reference:uniform", "expert:web"], ["experts/web", "references/uniform"]),
        (["expert:web", "experts"], ["experts/web", "experts/math", "experts/code"]),
        (["base", "base"], ["base"]),
        (["references"], ["references/learned", "references/uniform", "references/proportional"]),
    ],
)
def test_words_become_runs_in_an_order_that_can_be_trained(
    config_path: Path, words: list[str], names: list[str]
) -> None:
    assert verbs._runs_named(load_config(config_path), words) == names


def test_experts_of_ones_own_are_trained_by_their_names(config_path: Path) -> None:
    rows = "{algebra: {math: 0.8, web: 0.2}, code: {code: 1.0}, web: {web: 1.0}, all: uniform}"
    config = load_config(config_path, [f"experts.components={rows}"])
    names = ["experts/algebra", "experts/code", "experts/web", "experts/all"]
    assert verbs._runs_named(config, ["experts"]) == names
    assert verbs._runs_named(config, ["expert:all"]) == ["experts/all"]


def test_experts_that_are_too_much_alike_are_refused_before_the_base_is_trained(
    config_path: Path, no_job: None
) -> None:
    rows = "{a: uniform, b: {math: 0.3334, code: 0.3333, web: 0.3333}, c: {web: 1.0}}"
    with pytest.raises(ConfigError, match="condition number"):
        verbs.run(config_path, [f"experts.components={rows}"])
    with pytest.raises(ConfigError, match=r"condition number .* Lower experts.general_share"):
        verbs.run(config_path, ["experts.general_share=0.9999"])
    assert not (config_path.parent / "run").exists()


def test_an_unknown_task_is_refused_before_anything_is_trained(
    config_path: Path, no_job: None
) -> None:
    settings = ["evaluate.capabilities.asked={lm_eval: {tasks: [tasks/mine.yaml]}}"]
    with pytest.raises(ConfigError, match=r"capability asked: .*there is no task file .*mine"):
        verbs.train(config_path, settings, ["base"])


def test_an_unknown_task_is_refused_before_the_first_launch(tmp_path: Path, no_job: None) -> None:
    path = write_launch(tmp_path, {})
    asked = "evaluate.capabilities.asked={lm_eval: {tasks: [tasks/mine.yaml]}}"
    settings = ["tokenizer={kind: byte}", asked]
    with pytest.raises(ConfigError, match=r"capability asked: .*there is no task file .*mine"):
        verbs.train(path, settings, ["experts"])


@pytest.mark.parametrize(
    ("metric", "keys", "message"),
    [
        ("f1", ["a", "b"], r"capability asked: .*the task own has no metric 'f1'"),
        ("acc", ["a", ""], r"capability asked: task own, document 1: a choice is empty"),
    ],
)
def test_what_a_task_cannot_measure_is_refused_before_the_first_launch(
    tmp_path: Path, no_job: None, metric: str, keys: list[str], message: str
) -> None:
    task = lm_eval_tasks.write_choices(tmp_path, [["x", key] for key in keys])
    asked = f"evaluate.capabilities.asked={{lm_eval: {{tasks: [{task}], metric: {metric}}}}}"
    path = write_launch(tmp_path, {})
    with pytest.raises(ConfigError, match=message):
        verbs.train(path, ["tokenizer={kind: byte}", asked], ["experts"])


def test_given_checkpoints_are_not_trained(config_path: Path) -> None:
    assert verbs._runs_named(with_base(config_path), ["base", "experts"]) == EXPERTS
    assert verbs._runs_named(with_experts(config_path), ["base", "experts"]) == []


def test_a_finished_run_starts_no_process(
    config_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = base_run(load_config(config_path))
    assert run is not None
    run.mark_started()
    write_checkpoint(run.checkpoints / "iter_0000010", {"weight": torch.ones(2)})
    run.mark_finished({"checkpoint": "checkpoints/iter_0000010"})
    verbs.train(config_path, [], ["base"])
    assert capsys.readouterr().out == "base: already trained\n"
    assert not RunDir(run.directory.parent).log("train").exists()


def test_nothing_to_train_is_said(config_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = with_base(config_path).base.checkpoint
    verbs.train(config_path, [f"base={{checkpoint: {folder}}}"], ["base"])
    assert capsys.readouterr().out == "nothing to train\n"


def test_the_settings_go_on_record_with_every_default(config_path: Path) -> None:
    with verbs.experiment_on_record(config_path, ["search.seed=4"]) as config:
        record = json.loads(RunDir(config.run_dir).config.read_text())
    assert record["search"]["seed"] == 4
    assert record["experts"]["general_share"] == 0.25
    assert record == config.model_dump(mode="json")


def test_a_second_start_changes_nothing_on_record(config_path: Path) -> None:
    with verbs.experiment_on_record(config_path, []) as config:
        before = RunDir(config.run_dir).config.read_bytes()
        with (
            pytest.raises(MergeMixError, match="under way already"),
            verbs.experiment_on_record(config_path, ["search.seed=4"]),
        ):
            pytest.fail("two at once")
        assert RunDir(config.run_dir).config.read_bytes() == before


def test_files_are_checked_before_anything_is_written(config_path: Path) -> None:
    with (
        pytest.raises(DataError, match="/nowhere/math.idx"),
        verbs.experiment_on_record(config_path, ["domains.math.prefixes=[/nowhere/math]"]),
    ):
        pytest.fail("a dataset is missing")
    assert not (config_path.parent / "run").exists()


@pytest.mark.parametrize("verb", [verbs.blend, verbs.validate])
def test_later_stages_say_that_the_search_comes_first(config_path: Path, verb) -> None:
    config = with_experts(config_path)
    experts = {name: str(path) for name, path in config.experts.checkpoints.items()}
    overrides = [f"base={{checkpoint: {config.base.checkpoint}}}", f"experts.checkpoints={experts}"]
    with pytest.raises(MergeMixError, match="Run `mergemix search mix.yaml` first"):
        verb(config_path, overrides)
    assert not (config_path.parent / "run" / "blend").exists()


# ---- what is refused before hours of training, and what is shown in the end ----


def given_experts(config_path: Path, *more: str) -> list[str]:
    config = with_experts(config_path)
    experts = {name: str(path) for name, path in config.experts.checkpoints.items()}
    base = f"base={{checkpoint: {config.base.checkpoint}}}"
    return [base, f"experts.checkpoints={experts}", *more]


@pytest.fixture
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verbs, "run_job", lambda *words, quiet: pytest.fail(f"a job: {words[1:]}"))


def test_what_references_will_not_tell_is_said_before_they_are_trained(
    config_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []

    def job(*words: object, quiet: bool) -> None:
        said.append(capsys.readouterr().out)
        raise MergeMixError("the job")

    monkeypatch.setattr(verbs, "run_job", job)
    finish_search(load_config(config_path, given_experts(config_path)))
    for more in ([], ["validation.space_filling=1"]):
        overrides = given_experts(config_path, *more)
        with pytest.raises(MergeMixError, match="the job"):
            verbs.validate(config_path, overrides)
    assert said[0].startswith("note: 3 references tell which of them is best when really trained")
    assert "note" not in said[1]


def test_without_references_the_way_to_some_is_said(config_path: Path, no_job: None) -> None:
    with pytest.raises(ConfigError, match=r"chosen: --set validation.space_filling=24\.$"):
        verbs.validate(config_path, given_experts(config_path, "references={}"))


def test_a_stale_learned_mixture_is_not_trained(config_path: Path, no_job: None) -> None:
    overrides = given_experts(config_path)
    finish_search(load_config(config_path, overrides))
    now = [*overrides, "search.surrogate=gp"]
    for words in (["reference:learned"], ["reference:uniform", "reference:learned"]):
        with pytest.raises(SearchError, match="Run `mergemix search mix.yaml` first"):
            verbs.train(config_path, now, words)
    with pytest.raises(SearchError, match="Run `mergemix search mix.yaml` first"):
        verbs.validate(config_path, now)


def test_validation_without_a_search_is_refused_before_it_trains(
    config_path: Path, no_job: None
) -> None:
    overrides = given_experts(config_path, "references={uniform: uniform}")
    with pytest.raises(SearchError, match="Run `mergemix search mix.yaml` first"):
        verbs.validate(config_path, overrides)


def test_a_validation_ends_with_the_blend_the_table_and_the_files(
    config_path: Path, no_job: None, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = given_experts(config_path)
    config = load_config(config_path, overrides)
    finish_search(config)
    names = ("learned", "uniform", "proportional")
    finish_references(config, dict.fromkeys(names, losses(1, 2, 3)))
    verbs.validate(config_path, overrides)
    shown = capsys.readouterr().out
    marks = ["--data-path 0.5", "epochs over 1000 tokens", "best first", "trials:", "blend:"]
    places = [shown.index(mark) for mark in marks]
    assert places == sorted(places)
    # 500, 250 and 250 of 1000 tokens, from domains of 600, 300 and 100.
    assert "epochs over 1000 tokens: math 0.833, code 0.833, web 2.5\n" in shown


def test_without_the_tokens_of_the_big_run_no_epochs_are_shown(
    config_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = given_experts(config_path, "blend.train_tokens=null")
    finish_search(load_config(config_path, overrides))
    verbs.blend(config_path, overrides)
    shown = capsys.readouterr().out
    assert "--data-path 0.5" in shown
    assert "epochs" not in shown


def test_a_blend_is_written_while_something_else_is_under_way(config_path: Path) -> None:
    config = with_experts(config_path)
    overrides = given_experts(config_path)
    finish_search(config)
    with RunDir(config.run_dir).lock("run"):
        verbs.blend(config_path, overrides)
    assert (RunDir(config.run_dir).blend / "blend.yaml").exists()


def test_the_tokens_of_the_big_run_may_be_decided_after_the_search(
    config_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """But where a domain has max_epochs: they decide where the search looks."""
    overrides = given_experts(config_path)
    finish_search(load_config(config_path, overrides))
    verbs.blend(config_path, [*overrides, "blend.train_tokens=1100"])
    assert "epochs over 1100 tokens: math 0.917" in capsys.readouterr().out
    limited = [*overrides, "domains.math.max_epochs=1"]
    with pytest.raises(SearchError, match=r"of other settings \(bounds: .* max_epochs\.$"):
        verbs.blend(config_path, limited)


def test_a_search_whose_inputs_changed_meanwhile_is_an_error(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verbs, "run_job", lambda *words, quiet: None)
    with pytest.raises(SearchError, match="were changed while the search ran"):
        verbs.search(config_path, given_experts(config_path))


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["domains.web.bounds=[0, 0.5]", "experts.lr=1e-05", "experts.tokens=5e20"],
        ["run_dir=HOME/b\u00e9 \U0001f600", "model.num_query_groups=1"],
    ],
)
def test_what_is_on_record_is_the_same_experiment(config_path: Path, changes: list[str]) -> None:
    changes = [change.replace("HOME", str(config_path.parent)) for change in changes]
    for overrides in (changes, given_experts(config_path, *changes)):
        with verbs.experiment_on_record(config_path, overrides) as config:
            record = RunDir(config.run_dir).config.read_text(encoding="utf-8")
        assert Config.model_validate_json(record) == config
