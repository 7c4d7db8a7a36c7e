"""Two runs side by side, and what of them compares."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_mergemix.cli import main
from megatron_mergemix.config import load_config
from megatron_mergemix.report.compare import comparison
from megatron_mergemix.report.gather import Run, read_run
from megatron_mergemix.report.table import Table
from tests.support.searched import finish


@pytest.fixture(scope="module")
def other(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a search of the same experts on the same items, of another seed and more noise."""
    folder = tmp_path_factory.mktemp("other") / "other"
    changes = [f"run_dir={folder}", "search.seed=3", "search.surrogate=quadratic"]
    config = load_config(finished, changes)
    finish(config, luck=0.03)
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
    # Mixtures are shares of the same domains whatever they were scored on.
    assert named(list(found.tables), "mixtures").rows[0][-1] is not None


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
