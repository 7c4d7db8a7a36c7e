"""Two runs side by side, and what of them compares."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mergemix.cli import main
from megatron_mergemix.config import load_config
from megatron_mergemix.report.compare import comparison
from megatron_mergemix.report.gather import Run, read_run
from megatron_mergemix.report.table import Table
from tests.support.searched import finish
from tests.support.validated import put_validation


@pytest.fixture(scope="module")
def run(measured: Path) -> Run:
    return read_run(measured)


@pytest.fixture(scope="module")
def other(measured: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a search of the same experts on the same items, of another seed and more noise."""
    folder = tmp_path_factory.mktemp("other") / "other"
    changes = [f"run_dir={folder}", "search.seed=3", "search.surrogate=quadratic"]
    config = load_config(measured, changes)
    finish(config, luck=0.03)
    put_validation(config)
    return read_run(folder)


def named(tables: list[Table] | tuple[Table, ...], key: str) -> Table:
    (found,) = [table for table in tables if table.key == key]
    return found


def test_settings_that_differ_are_listed_and_no_others(run: Run, other: Run) -> None:
    table = named(list(comparison(run, other).tables), "settings")
    assert [list(row) for row in table.rows] == [
        ["search.surrogate", "auto", "quadratic"],
        ["search.seed", "0", "3"],
    ]


def test_on_the_same_items_the_difference_is_paired_on_the_first_scale(
    run: Run, other: Run
) -> None:
    found = comparison(run, other)
    assert found.comparable
    assert "scored the same items" in found.remarks[0]
    rows = {row[0]: row[1:] for row in named(list(found.tables), "utilities").rows}
    first, error, second, other_error, difference, paired = rows["uniform"]
    assert run.scale is not None
    uniform = [
        next(t for t in each.trials if t.purpose == "prior:uniform") for each in (run, other)
    ]
    assert first == run.utility.of_trial(uniform[0].scores, run.scale).value
    assert second == run.utility.of_trial(uniform[1].scores, run.scale).value
    assert difference == pytest.approx(second - first)
    gain = run.utility.gain(uniform[1].scores, uniform[0].scores, run.scale)
    assert paired == gain.stderr
    assert paired < np.hypot(error, other_error)  # the items' common hardness cancels


def test_on_other_items_no_difference_is_given(run: Run, other: Run) -> None:
    digests = {**other.digests, "evaluate.math-text": "other windows"}
    found = comparison(run, Run(**{**vars(other), "digests": digests}))
    assert not found.comparable
    assert "do not compare: evaluate.math-text differ" in found.remarks[0]
    for row in named(list(found.tables), "utilities").rows:
        assert tuple(row[-2:]) == (None, None)
    for row in named(list(found.tables), "capabilities").rows:
        assert row[-1] is None
    for key in ("surrogates", "fidelity"):
        for row in named(list(found.tables), key).rows:
            assert row[-1] is None, row[0]
    # Mixtures are shares of the same domains whatever they were scored on.
    assert named(list(found.tables), "mixtures").rows[0][-1] is not None


def references(run: Run) -> dict[str, dict[str, Any]]:
    assert run.validation is not None
    return {row["name"]: row for row in run.validation["references"]}


def test_references_of_both_runs_are_on_the_first_scale(run: Run, other: Run) -> None:
    found = {row[0]: row[1:] for row in named(list(comparison(run, other).tables), "fidelity").rows}
    assert run.scale is not None
    assert other.scale is not None
    first, second = (references(each)["uniform"] for each in (run, other))
    for what, one, two in (
        ("proxy", first["proxy"], second["proxy"]),
        ("really trained", first, second),
    ):
        values = [-one["scores"][name]["loss"] for name in run.utility.capabilities]
        assert one["utility"] == pytest.approx(run.utility.combine(np.array(values), run.scale))
        values = [-two["scores"][name]["loss"] for name in run.utility.capabilities]
        on_first = run.utility.combine(np.array(values), run.scale)
        assert two["utility"] != pytest.approx(on_first)  # so the scales do differ
        shown = found[f"uniform: {what}"]
        assert shown == [
            pytest.approx(each) for each in (one["utility"], on_first, on_first - one["utility"])
        ]
    assert not any("filling" in str(name) for name in found)


def test_rank_correlations_are_those_of_the_utilities_that_are_compared(
    run: Run, other: Run
) -> None:
    on_its_own = named(list(comparison(other, run).tables), "fidelity")
    assert other.validation is not None
    recorded = other.validation["fidelity"]
    rows = {row[0]: row[1] for row in on_its_own.rows}
    assert rows["utility of proxies: Spearman"] == pytest.approx(recorded["overall"]["spearman"])
    assert rows["utility of proxies: Kendall"] == pytest.approx(recorded["overall"]["kendall"])
    assert rows["math-text: Spearman"] == recorded["capabilities"]["math-text"]["spearman"]
    assert not any("predicted" in str(name) for name in rows)


def test_on_other_items_references_are_on_the_scale_of_their_own_run(run: Run, other: Run) -> None:
    digests = {**other.digests, "evaluate.math-text": "other windows"}
    found = named(list(comparison(run, replace(other, digests=digests)).tables), "fidelity")
    rows = {row[0]: row[1:] for row in found.rows}
    expected = [references(each)["learned"]["utility"] for each in (run, other)]
    assert rows["learned: really trained"] == [*map(pytest.approx, expected), None]


def test_another_utility_is_another_number(run: Run, other: Run) -> None:
    evaluate = other.config.evaluate
    utility = evaluate.utility.model_copy(update={"normalize": "none"})
    changed = other.config.model_copy(
        update={"evaluate": evaluate.model_copy(update={"utility": utility})}
    )
    found = comparison(run, Run(**{**vars(other), "config": changed}))
    assert not found.comparable
    assert "evaluate.utility" in found.remarks[0]


def test_the_command_prints_and_writes_both_formats(
    run: Run, other: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    roots = [str(each.run_dir.root) for each in (run, other)]
    files = [str(tmp_path / "c.json"), str(tmp_path / "c.html")]
    assert main(["compare", *roots, "--json", files[0], "--html", files[1]]) == 0
    printed = capsys.readouterr().out
    for title in ("Settings that differ", "Learned mixture", "Measured utility", "Cost"):
        assert title in printed
    record = json.loads(Path(files[0]).read_text())
    assert record["names"] == ["run", "other"]
    assert record["comparable"] is True
    assert '<table id="table-utilities"' in Path(files[1]).read_text()


def test_a_run_is_not_compared_with_itself(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    root = run.run_dir.root
    assert main(["compare", str(root), str(root.parent / "mix.yaml")]) == 1
    assert "compared with itself" in capsys.readouterr().err


def test_without_a_first_scale_no_utilities_are_said_to_be_on_it(run: Run, other: Run) -> None:
    found = comparison(replace(run, scale=None), other)
    assert not found.comparable
    assert "the first has no utilities yet" in found.remarks[0]
