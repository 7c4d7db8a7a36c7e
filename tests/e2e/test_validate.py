"""Five references of a tiny experiment, really trained, killed on the way, and compared.

Every number of the result is computed again here, from the recorded scores alone.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from megatron_mergemix.report.gather import models, read_run
from megatron_mergemix.search.journal import read_journal
from megatron_mergemix.trials import Trial
from tests.support.experiment import DOMAINS, write_experiment
from tests.support.forked_jobs import run_verb
from tests.support.processes import mergemix

pytestmark = pytest.mark.timeout(900)

REFERENCES = ("learned", "uniform", "proportional", "filling-01", "filling-02")
STEPS, SAVED = 24, 6


@dataclass
class Story:
    """What was seen on the way."""

    run_dir: Path
    finished: dict[str, tuple[int, int]]
    resumed: str
    again: str
    first_result: bytes

    @property
    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.first_result)
        return found


def finished_references(run_dir: Path) -> dict[str, tuple[int, int]]:
    """Return inode and time of what says that a reference is trained."""
    paths = {name: run_dir / "references" / name / "finished.json" for name in REFERENCES}
    found = {name: path.stat() for name, path in paths.items() if path.exists()}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()}


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Search, validate until the third reference has saved, kill, validate twice more."""
    home = tmp_path_factory.mktemp("validate")
    changes = {
        "parallel": {"processes": 1, "tensor": 1},
        "training": {"save_interval": SAVED},
        "base": {"train": {"tokens": 5120, "lr": 5e-3}},
        "experts": {"tokens": 512 * STEPS},
        "search": {"trials": 8},
        "validation": {"space_filling": 2},
    }
    path, run_dir = write_experiment(home, changes), home / "run"
    run_verb(path, "run")
    third = run_dir / "references" / REFERENCES[2]
    with mergemix(path, "validate") as command:
        command.wait_until((third / "checkpoints" / f"iter_{SAVED:07d}").exists)
        os.killpg(command.process.pid, signal.SIGKILL)
        command.end()
        assert command.survivors() == []
    assert not (third / "finished.json").exists(), "the kill came too late"
    finished = finished_references(run_dir)
    with mergemix(path, "validate") as command:
        assert command.end() == 0, command.stderr
        resumed = command.stdout
    first_result = (run_dir / "validate" / "result.json").read_bytes()
    again = run_verb(path, "validate")
    return Story(run_dir, finished, resumed, again, first_result)


def test_what_was_trained_before_the_kill_is_kept(story: Story) -> None:
    assert list(story.finished) == list(REFERENCES[:2])
    assert finished_references(story.run_dir).items() >= story.finished.items()
    assert f"references/{REFERENCES[2]}: continues from step " in story.resumed
    for name in REFERENCES[:2]:
        assert f"references/{name}: already trained" in story.resumed


def test_a_second_validation_trains_and_scores_nothing_and_says_the_same(story: Story) -> None:
    assert (story.run_dir / "validate" / "result.json").read_bytes() == story.first_result
    assert "references/" not in story.again
    assert "do merges rank 5 mixtures" in story.again
    assert story.again[story.again.index("best first") :] in story.resumed


# ---- computed again, from the records ----


def values_of(scores: dict[str, Any]) -> np.ndarray:
    """Return oriented bits per byte of the three domains."""
    return np.array([-scores[name]["bpb"]["value"] for name in DOMAINS])


def trials_of(run_dir: Path) -> list[Trial]:
    return read_journal(run_dir / "search" / "trials.jsonl")[1]


@pytest.fixture(scope="module")
def measured(story: Story) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return name -> oriented scores of the merge and of the really trained model."""
    records = [json.loads(p.read_text()) for p in (story.run_dir / "evaluate").glob("*.json")]
    named = {record["name"]: record for record in records}
    merges = {name: named.pop(f"mixture {name}") for name in REFERENCES}
    assert set(named) == {f"expert {name}" for name in DOMAINS}, "scored by the search"
    found = {}
    for name in REFERENCES:
        folder = story.run_dir / "references" / name
        trained = json.loads((folder / "scores.json").read_text())
        assert trained["mixture"] == pytest.approx(merges[name]["mixture"])
        found[name] = values_of(merges[name]["scores"]), values_of(trained["scores"])
    return found


@pytest.fixture(scope="module")
def utilities(
    story: Story, measured: dict[str, tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the utilities of merges and models: the vertices of the search are 0 and 1."""
    vertices = np.array(
        [
            [-trial.scores[name]["bpb"].value for name in DOMAINS]
            for trial in trials_of(story.run_dir)
            if trial.purpose == "vertex"
        ]
    )
    zero, unit = vertices.min(axis=0), np.ptp(vertices, axis=0)
    sides = np.array([measured[name] for name in REFERENCES])  # (references, sides, domains)
    utility = ((sides - zero) / unit).mean(axis=-1)
    return utility[:, 0], utility[:, 1]


def test_rows_are_what_was_measured_the_best_first(
    story: Story, utilities: tuple[np.ndarray, np.ndarray]
) -> None:
    rows = {row["name"]: row for row in story.result["references"]}
    assert set(rows) == set(REFERENCES)
    for name, merge, trained in zip(REFERENCES, *utilities, strict=True):
        assert rows[name]["proxy"]["utility"] == pytest.approx(merge)
        assert rows[name]["utility"] == pytest.approx(trained)
    shown = [row["utility"] for row in story.result["references"]]
    assert shown == sorted(shown, reverse=True)
    assert len(set(shown)) == 5


def test_fidelity_is_that_of_the_recorded_scores(
    story: Story,
    measured: dict[str, tuple[np.ndarray, np.ndarray]],
    utilities: tuple[np.ndarray, np.ndarray],
) -> None:
    fidelity = story.result["fidelity"]
    sides = np.array([measured[name] for name in REFERENCES])
    parts = {name: (sides[:, 0, at], sides[:, 1, at]) for at, name in enumerate(DOMAINS)}
    for part, (merge, trained) in [
        (fidelity["overall"], utilities),
        *((fidelity["capabilities"][name], pair) for name, pair in parts.items()),
    ]:
        assert part["n"] == 5
        rho = scipy.stats.spearmanr(merge, trained).statistic
        tau = scipy.stats.kendalltau(merge, trained).statistic
        assert part["spearman"] == pytest.approx(rho)
        assert part["kendall"] == pytest.approx(tau)
        assert part["mean_absolute_error"] == pytest.approx(np.abs(merge - trained).mean())
        low, high = part["spearman_interval"]
        assert -1 <= low <= high <= 1
    merge, trained = utilities
    order = np.argsort(-merge)
    for k in (1, 3):
        lost = trained.max() - trained[order[:k]].max()
        assert fidelity["top_k"][str(k)]["regret"] == pytest.approx(lost)


def test_calibration_is_the_share_of_new_mixtures_in_their_intervals(story: Story) -> None:
    """Those of which the search has no trial."""
    rows = [row for row in story.result["references"] if row["name"].startswith("filling-")]
    assert story.result["fidelity"]["calibration_n"] == len(rows) == 2
    for key, value in (
        ("calibration", lambda row: row["utility"]),
        ("calibration_of_merges", lambda row: row["proxy"]["utility"]),
    ):
        for level, share in story.result["fidelity"][key].items():
            limits = [row["predicted"]["intervals"][level] for row in rows]
            inside = [a <= value(row) <= b for row, (a, b) in zip(rows, limits, strict=True)]
            assert share == pytest.approx(np.mean(inside))


def test_a_merge_that_the_search_had_scored_scores_the_same(
    story: Story, measured: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    priors = {f"prior:{name}": name for name in ("uniform", "proportional")}
    seen = [trial for trial in trials_of(story.run_dir) if trial.purpose in priors]
    assert len(seen) == 2
    for trial in seen:
        scores = [-trial.scores[name]["bpb"].value for name in DOMAINS]
        np.testing.assert_allclose(measured[priors[trial.purpose]][0], scores, rtol=1e-6)


def test_costs_are_the_sums_of_the_records(story: Story) -> None:
    def seconds(paths: list[Path]) -> float:
        found = [json.loads(path.read_text())["seconds"] for path in paths]
        assert min(found) > 0
        return sum(found)

    run_dir = story.run_dir
    found = story.result["costs"]
    scored = (run_dir / "evaluate").glob("*.json")
    merges = [path for path in scored if "mixture " in json.loads(path.read_text())["name"]]
    trials = sum(sum(trial.seconds.values()) for trial in trials_of(run_dir))
    experts = [run_dir / "experts" / name / "finished.json" for name in DOMAINS]
    references = [run_dir / "references" / name / "finished.json" for name in REFERENCES]
    trained = [path.with_name("scores.json") for path in references]
    assert found["proxies"]["tokens"] == 3 * 512 * STEPS
    assert found["references"]["tokens"] == 5 * 512 * STEPS
    assert found["proxies"]["training_seconds"] == pytest.approx(seconds(experts))
    assert found["proxies"]["scoring_seconds"] == pytest.approx(trials + seconds(merges))
    assert found["references"]["training_seconds"] == pytest.approx(seconds(references))
    assert found["references"]["scoring_seconds"] == pytest.approx(seconds(trained))


def test_the_report_compares_the_experts_themselves_without_further_ado(story: Story) -> None:
    names = [model.name for model in models(read_run(story.run_dir.parent / "mix.yaml"))]
    wanted = ("uniform", "proportional", "learned")
    assert {"base", *wanted, *(f"expert {name}" for name in DOMAINS)} <= set(names)


def test_the_killed_reference_counts_the_time_of_both_starts(story: Story) -> None:
    folder = story.run_dir / "references" / REFERENCES[2]
    before = json.loads((folder / "seconds.json").read_text())["seconds_before"]
    assert 0 < before < json.loads((folder / "finished.json").read_text())["seconds"]


def test_tensorboard_has_the_fidelity(story: Story) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(story.run_dir / "tensorboard" / "validate"))
    events.Reload()
    [event] = events.Scalars("fidelity/overall/spearman")
    assert event.step == 5
    expected = story.result["fidelity"]["overall"]["spearman"]
    assert event.value == pytest.approx(expected, abs=1e-6)
