"""Tasks of lm-eval in a whole search: what a task's own code does, and every mistake in a task."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_mergemix.cli import main
from megatron_mergemix.config import load_config
from megatron_mergemix.evaluate.first_items import first_count
from megatron_mergemix.search.journal import read_journal
from megatron_mergemix.training_runs.experiment_runs import base_checkpoint, expert_checkpoints
from megatron_mergemix.trials import Trial
from tests.support import lm_eval_tasks
from tests.support.forked_jobs import run_verb
from tests.support.run_distributed import RankFailure

QUESTIONS = [["ab", "ba"], ["bc", "cd"], ["e", "fgh"]]

SCORING = """
calls = 0

def score(document, results):
    \"\"\"Say whether the likelier choice is right; not of some candidates, by their numbers.\"\"\"
    global calls
    (candidate, question), calls = divmod(calls, {questions}), calls + 1
    if candidate in {failing} and question == {questions} - 1:
        raise ValueError("no such answer")
    return {{"acc": float(results[0][0] > results[1][0])}}
"""


def scored_by(folder: Path, failing: Sequence[int]) -> Path:
    """Write a task whose own code fails while it scores these candidates."""
    task = lm_eval_tasks.write_choices(folder, QUESTIONS)
    code = SCORING.format(questions=len(QUESTIONS), failing=tuple(failing))
    (folder / "scoring.py").write_text(code)
    task.write_text(task.read_text() + "process_results: !function scoring.score\n")
    return task


def settings(trained: Path, run_dir: Path, task: Path | str) -> list[str]:
    """Return overrides: the experts that are there, and a capability that is recorded alone."""
    given = load_config(trained)
    experts = {name: str(path) for name, path in expert_checkpoints(given).items()}
    pairs = [
        f"run_dir={run_dir}",
        f"base={{checkpoint: {base_checkpoint(given)}}}",
        f"experts={{checkpoints: {json.dumps(experts)}}}",
        "evaluate.held_out=0",
        f"evaluate.capabilities.asked={{lm_eval: {{tasks: [{task}]}}}}",
        "evaluate.utility.weights={math: 1, code: 1, prose: 1, asked: 0}",
        "tokenizer={kind: byte}",
    ]
    return [word for pair in pairs for word in ("--set", pair)]


def trials_in(run_dir: Path) -> list[Trial]:
    return read_journal(run_dir / "search" / "trials.jsonl")[1]


def test_a_candidate_that_a_task_cannot_score_is_a_failed_trial_and_the_search_goes_on(
    trained_experiment: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    words = settings(trained_experiment, run_dir, scored_by(tmp_path, failing=[7]))
    shown = run_verb(trained_experiment, "search", *words)
    failed = {trial.index: trial.error for trial in trials_in(run_dir) if trial.error}
    what = "capability asked: task own cannot score what the model answered: ValueError: no such"
    assert failed.keys() == {7}
    assert what in str(failed[7])
    assert "uniform" in shown
    for trial in trials_in(run_dir):
        assert trial.error or trial.scores["asked"]["own/acc"].num_samples == len(QUESTIONS)

    shown = run_verb(trained_experiment, "evaluate", "base", *words)
    assert "asked" in shown


def test_three_candidates_in_a_row_that_a_task_cannot_score_end_the_search(
    trained_experiment: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    words = settings(trained_experiment, run_dir, scored_by(tmp_path, failing=[4, 5, 6]))
    with pytest.raises(RankFailure, match="3 candidates failed in a row; the last: .*capability"):
        run_verb(trained_experiment, "search", *words)
    assert [trial.index for trial in trials_in(run_dir) if trial.error] == [4, 5, 6]
    assert not (run_dir / "search" / "result.json").exists()


def test_a_raced_search_asks_some_candidates_the_rest_of_the_questions(
    trained_experiment: Path, tmp_path: Path
) -> None:
    letters = "abcdefghijkl"
    questions = [[first + second, second + first] for first, second in pairwise(letters)]
    run_dir, task = tmp_path / "run", lm_eval_tasks.write_choices(tmp_path, questions)
    words = settings(trained_experiment, run_dir, task)
    words += ["--set", "search.first_share=0.5", "--set", "evaluate.held_out=0.2"]
    run_verb(trained_experiment, "search", *words)
    scores = [(trial, trial.scores["asked"]["own/acc"]) for trial in trials_in(run_dir)]
    seen = len(questions) - 2  # the others are held out
    half = first_count(seen, 0.5)
    assert {s.num_samples for t, s in scores if t.first is None} == {seen}
    begun = {tuple(t.mixture.values()): s.items for t, s in scores if t.first is not None}
    assert {len(items) for items in begun.values()} == {half}
    raced = [(t, s) for t, s in scores if t.purpose.startswith("race:")]
    assert 2 <= len(raced) < len(begun)
    for trial, score in raced:
        assert score.items[:half] == begun[tuple(trial.mixture.values())]
        assert score.value == pytest.approx(sum(score.items) / seen)
    assert len({score.value for _, score in raced}) > 1, "all alike can show no mistake"

    told = json.loads((run_dir / "search" / "result.json").read_text())
    assert told["held_out"]["items"]["asked"] == 2
    assert {"recommended", "uniform"} <= set(told["held_out"]["models"])
    what_ran = read_journal(run_dir / "search" / "trials.jsonl")[0]["evaluate.asked"]
    assert re.search(r"metrics own/acc.* own, 0-shot, 11 of 11 documents without \d+ \d+", what_ran)
    assert re.search(r"sha256 [0-9a-f]{8,}", what_ran)


NOT_YAML = "task: own\n  output_type: [\n"
WRONG = {
    "no such task": ("arc_hard_", None, "capability asked: .*arc_hard_"),
    "no YAML": (None, NOT_YAML, "capability asked: .*own.yaml"),
    "an empty choice": (None, [["a", ""]], "task own, document 0: a choice is empty"),
    "a long answer": (
        None,
        [["a", "b" * 40]],
        "document 0: .* sees 32 at once",
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_in_a_task_is_one_message_before_any_rank_is_started(
    trained_experiment: Path,
    tmp_path: Path,
    mistake: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, content, message = WRONG[mistake]
    task = tmp_path / "own.yaml"
    if isinstance(content, str):
        task.write_text(content)
    elif content is not None:
        task = lm_eval_tasks.write_choices(tmp_path, content)
    words = settings(trained_experiment, tmp_path / "run", name or task)
    assert main(["plan", str(trained_experiment), *words]) == 1
    told = capsys.readouterr().err
    assert told.count("error:") == 1
    assert "Traceback" not in told
    assert re.search(message, told)


def test_a_mistake_in_a_task_ends_a_search_before_its_first_trial(
    trained_experiment: Path, tmp_path: Path
) -> None:
    words = settings(trained_experiment, tmp_path / "run", tmp_path / "none.yaml")
    with pytest.raises(RankFailure, match=r"capability asked: .*there is no task file .*none.yaml"):
        run_verb(trained_experiment, "search", *words)
    assert not (tmp_path / "run" / "search" / "trials.jsonl").exists()
