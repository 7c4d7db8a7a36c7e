"""Four domains in two groups, from nothing to a blend, by both orders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_mergemix.search.journal import read_journal
from megatron_mergemix.trials import Trial
from tests.support.datasets import make_domains
from tests.support.experiment import write_experiment
from tests.support.forked_jobs import run_verb
from tests.support.processes import mergemix

pytestmark = pytest.mark.timeout(900)

GROUPS = {"exact": ["math", "code"], "text": ["prose", "web"]}
LEAVES = [leaf for leaves in GROUPS.values() for leaf in leaves]
LIMIT = 0.7
"""Largest share of ``text``."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the YAML of an experiment whose four experts are trained."""
    directory = tmp_path_factory.mktemp("hierarchy")
    more = make_domains(directory / "more", ["web"], 20000)
    path = write_experiment(directory, {"domains": {"web": {"prefixes": [more["web"]]}}})
    settings = yaml.safe_load(path.read_text())
    flat = settings["domains"]
    settings["domains"] = {
        group: {"children": {leaf: flat[leaf] for leaf in leaves}}
        for group, leaves in GROUPS.items()
    }
    settings["domains"]["text"]["bounds"] = [0.0, LIMIT]
    settings["search"] = {
        "hierarchy": "top_down", "trials": 6, "group_trials": {"exact": 6, "text": 5},
        "surrogate": "gp",
    }  # fmt: skip
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    run_verb(path, "train", "base", "experts")
    return path


def run(config: Path, *words: str) -> tuple[str, dict[str, Any], list[Trial]]:
    """Run to the blend; return what was printed, the result and the trials."""
    printed = run_verb(config, "run", *words)
    search = config.parent / "run" / "search"
    result = json.loads((search / "result.json").read_text())
    return printed, result, read_journal(search / "trials.jsonl")[1]


def check(config: Path, result: dict[str, Any], trials: list[Trial]) -> None:
    """Check what holds for either order."""
    assert [trial.index for trial in trials] == list(range(len(trials)))
    assert not any(trial.error for trial in trials)
    for mixture in [result["mixture"], *(trial.mixture for trial in trials if trial.mixture)]:
        assert list(mixture) == LEAVES
        assert sum(mixture.values()) == pytest.approx(1)
        assert mixture["prose"] + mixture["web"] <= LIMIT + 1e-9
    assert list(result["merge_weights"]) == LEAVES
    run_dir = config.parent / "run"
    experts = [path.name for path in (run_dir / "experts").iterdir() if path.is_dir()]
    assert sorted(experts) == sorted(LEAVES)
    blend = (run_dir / "blend" / "data_path.txt").read_text()
    used = [leaf for leaf in LEAVES if result["mixture"][leaf] > 1e-3]
    assert all(f"/{leaf}" in blend for leaf in used)


def test_a_killed_search_from_the_top_goes_on_where_it_was(config: Path) -> None:
    printed, result, trials = run(config)
    check(config, result, trials)
    assert [stage["stage"] for stage in result["stages"]] == ["coarse", "exact", "text"]
    assert "search top_down: what each stage found" in printed
    assert "exact/" in printed
    # The journal as a kill within the second stage leaves it.
    search = config.parent / "run" / "search"
    whole = (search / "trials.jsonl").read_bytes()
    within = next(t.index for t in trials if t.purpose.startswith("exact/")) + 2
    (search / "trials.jsonl").write_bytes(b"".join(whole.splitlines(True)[: within + 1]))
    (search / "result.json").unlink()
    printed, again, trials_again = run(config)
    assert f"continues after {within} trials" in printed
    assert [(t.index, t.purpose, t.mixture) for t in trials_again] == [
        (t.index, t.purpose, t.mixture) for t in trials
    ]
    assert again["mixture"] == result["mixture"]
    # A search the other way needs a journal of its own, and says so.
    with mergemix(config, "run", "--set=search.hierarchy=bottom_up") as command:
        assert command.end() == 1
        assert "another run_dir" in command.stderr


def test_from_the_bottom_group_experts_are_merged(config: Path) -> None:
    search = config.parent / "run" / "search"
    for path in (search / "trials.jsonl", search / "result.json"):
        path.unlink(missing_ok=True)
    _, result, trials = run(config, "--set=search.hierarchy=bottom_up")
    check(config, result, trials)
    by_name = {stage["stage"]: stage for stage in result["stages"]}
    assert list(by_name) == ["leaves", "exact", "text", "coarse"]
    inside = by_name["exact"]["mixture"]["math"]
    for trial in trials:
        if trial.purpose.startswith("coarse/"):
            total = trial.mixture["math"] + trial.mixture["code"]
            assert trial.mixture["math"] == pytest.approx(total * inside)
