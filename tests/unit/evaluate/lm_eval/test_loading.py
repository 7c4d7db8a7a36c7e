"""Tasks by name and from files, and the errors where they are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from megatron_mergemix.config.evaluate import LmEvalTask
from megatron_mergemix.errors import ConfigError
from megatron_mergemix.evaluate.lm_eval import loading
from megatron_mergemix.evaluate.lm_eval.loading import load_tasks
from tests.support import lm_eval_tasks
from tests.support.blocked_imports import run_without


@pytest.fixture(autouse=True)
def _few_shipped_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the 14,000 tasks of lm-eval, which take 15 seconds to index."""
    arc = Path(loading.lm_eval.tasks.__file__).parent / "arc"
    index = loading.TaskIndex.build([arc])
    monkeypatch.setattr(loading, "_shipped", lambda: index)


def load(*tasks: str, **settings: Any) -> dict[str, Any]:
    return load_tasks(LmEvalTask(tasks=list(tasks), **settings))


def test_a_file_finds_its_data_beside_itself(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (task,) = load(str(folder / "own_choice.yaml")).values()
    assert len(task.eval_docs) == 12
    assert task.task_name == "own_choice"


def test_data_files_of_a_dataset_with_a_folder_of_its_own_are_found_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "shared" / "data").mkdir(parents=True)
    files = {name: f"data/{name}.jsonl" for name in ("train", "test")}
    for name, file in files.items():
        (tmp_path / "shared" / file).write_bytes((folder / f"{name}.jsonl").read_bytes())
    task = {
        **lm_eval_tasks.CHOICE,
        "task": "theirs",
        "dataset_path": str(tmp_path / "shared"),
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
    }
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(task))
    (found,) = load(str(tmp_path / "theirs.yaml")).values()
    assert len(found.eval_docs) == 12


def test_include_path_gives_names_groups_and_tags(tmp_path: Path) -> None:
    lm_eval_tasks.write(tmp_path)
    group = {"group": "own_group", "task": ["own_letters", "own_written"]}
    (tmp_path / "group.yaml").write_text(yaml.safe_dump(group))
    lm_eval_tasks.write_task(tmp_path, {**lm_eval_tasks.CHOICE, "task": "tagged", "tag": "own_tag"})
    found = load("own_group", "own_tag", "own_choice", include_path=[tmp_path])
    assert list(found) == ["own_letters", "own_written", "tagged", "own_choice"]
    by_file = load(str(tmp_path / "group.yaml"), include_path=[tmp_path])
    assert list(by_file) == ["own_letters", "own_written"]


def test_tasks_and_tags_that_come_with_lm_eval_are_found_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choices = {"text": ["fire", "water"], "label": ["A", "B"]}
    row = {"id": "1", "question": "Which is wet?", "choices": choices, "answerKey": "B"}
    parts = dict.fromkeys(("train", "validation", "test"), datasets.Dataset.from_list([row]))
    asked: list[tuple[str, str]] = []

    def load_dataset(path: str, name: str, **_: Any) -> datasets.DatasetDict:
        asked.append((path, name))
        return datasets.DatasetDict(parts)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)  # there may be no network
    (task,) = load("arc_easy").values()
    assert asked == [("allenai/ai2_arc", "ARC-Easy")]
    assert task.doc_to_text(row) == "Question: Which is wet?\nAnswer:"
    assert (task.doc_to_choice(row), task.doc_to_target(row)) == (["fire", "water"], 1)
    assert set(load("ai2_arc")) == {"arc_easy", "arc_challenge"}


def test_own_tasks_are_found_without_reading_those_of_lm_eval(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_shipped", None)
    assert list(load("own_choice", include_path=[folder])) == ["own_choice"]


def test_an_unknown_task_is_an_error_with_near_names(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no task, group or tag 'arc_eazy'.*Did you mean arc_easy"
    ):
        load("arc_eazy")
    with pytest.raises(ConfigError, match=r"'own_choise'.*Did you mean own_choice"):
        load("own_choise", include_path=[folder])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("own_more.yml", "task: own_more\n", r"own_more\.yml is not read; name it \.yaml"),
        ("own_more.yaml", "task: own_more\n  doc: [\n", r"own_more\.yaml cannot be read"),
    ],
)
def test_a_task_may_be_missed_because_its_file_is_not_read(
    folder: Path, tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    folders = [folder, tmp_path]
    with pytest.raises(ConfigError, match=rf"include_path: .*{message}"):
        load("own_more", include_path=folders)
    assert list(load("own_choice", include_path=folders)) == ["own_choice"]


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"no task file {tmp_path}/none.yaml"):
        load(str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match=rf"include_path: {tmp_path}/none is no folder"):
        load("arc_easy", include_path=[tmp_path / "none"])


@pytest.mark.parametrize("text", ["task: [", "- a\n- b\n", "just words", "name: x\n", "task: 3\n"])
def test_a_file_that_is_no_task_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"{path} is no task of lm-eval"):
        load(str(path))


def test_data_that_are_not_there_are_an_error_that_names_the_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lm_eval_tasks.write_task(tmp_path, lm_eval_tasks.LETTERS)
    with pytest.raises(ConfigError, match=r"task own_letters: its data cannot be loaded"):
        load(path)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    remote = {**lm_eval_tasks.LETTERS, "dataset_path": "nobody/nothing", "dataset_kwargs": {}}
    path = lm_eval_tasks.write_task(tmp_path, remote)
    with pytest.raises(ConfigError, match=r"task own_letters: its data cannot be loaded.*HF_HOME"):
        load(path)


def test_a_task_that_cannot_be_built_says_why(tmp_path: Path) -> None:
    lm_eval_tasks.write(tmp_path)
    path = lm_eval_tasks.write_task(tmp_path, {**lm_eval_tasks.LETTERS, "output_type": "guess"})
    with pytest.raises(ConfigError, match=r"own_letters .* cannot be built: .*'guess'"):
        load(path)


def test_the_same_task_twice_is_an_error(folder: Path) -> None:
    path = str(folder / "own_choice.yaml")
    with pytest.raises(ConfigError, match="the task own_choice twice"):
        load(path, path)


def test_code_of_the_model_is_not_run(tmp_path: Path) -> None:
    lm_eval_tasks.write(tmp_path)
    path = lm_eval_tasks.write_task(tmp_path, {**lm_eval_tasks.WRITTEN, "unsafe_code": True})
    with pytest.raises(ConfigError, match="task own_written runs code that the model writes"):
        load(path)


def test_worked_examples_are_set_as_lm_eval_does(folder: Path) -> None:
    files = [str(folder / f"{name}.yaml") for name in ("own_choice", "own_letters", "own_written")]

    def counts(**settings: Any) -> list[int]:
        return [task.config.num_fewshot for task in load(*files, **settings).values()]

    assert counts() == [2, 0, 0]
    assert counts(num_fewshot=3) == [3, 0, 3]


def test_without_the_package_the_error_names_the_extra() -> None:
    code = "import megatron_mergemix.evaluate.lm_eval.loading"
    done = run_without(["lm_eval"], code)
    assert "pip install 'megatron-mergemix[lm-eval]'" in done.stderr
