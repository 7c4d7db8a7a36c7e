"""Tables of what other commands left in the run directory."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_mergemix.report import tables
from megatron_mergemix.report.content import cosines_of, sections_of
from megatron_mergemix.report.costs import measured_table
from megatron_mergemix.report.gather import Run
from megatron_mergemix.report.table import Table

RANKS: dict[str, Any] = {
    "n": 6,
    "spearman": 0.9,
    "spearman_interval": [0.4, 1.0],
    "kendall": 0.8,
    "kendall_interval": None,
    "mean_absolute_error": 0.02,
}


def reference(name: str, share: float, utility: float, proxy: float) -> dict[str, Any]:
    mixture = {"math": share, "code": 1 - share, "web": 0.0}
    return {
        "name": name,
        "mixture": mixture,
        "utility": utility,
        "behind": 0.0,
        "behind_stderr": None,
        "scores": {"math-text": {"loss": 2.0}},
        "proxy": {"utility": proxy, "scores": {}},
        "predicted": {"utility": proxy + 0.01, "interval": [proxy - 0.1, proxy + 0.1]},
    }


VALIDATION = {
    "references": [reference("learned", 0.5, 0.6, 0.7), reference("uniform", 0.3, 0.5, 0.4)],
    "fidelity": {
        "overall": RANKS,
        "capabilities": {"math-text": {**RANKS, "spearman": None, "spearman_interval": None}},
        "surrogate": None,
        "top_k": {"1": {"regret": 0.03, "interval": [0.0, 0.1]}, "5": None},
        "calibration_n": 4,
        "calibration": {"0.5": 0.25, "0.95": 1.0},
        "calibration_shifted": None,
    },
    "costs": {
        "proxies": {"tokens": 300.0, "seconds": 7.0, "runs": 3},
        "references": {"tokens": 200.0, "seconds": None, "runs": 2},
    },
    "notes": ["Six references are few."],
}


@pytest.fixture
def validated(run: Run) -> Run:
    return Run(**{**vars(run), "validation": VALIDATION})


def rows(table: Table | None) -> dict[str, list[Any]]:
    assert table is not None
    assert all(len(row) == len(table.columns) for row in table.rows)
    return {str(row[0]): list(row[1:]) for row in table.rows}


def test_references_stand_beside_their_proxies_and_predictions(validated: Run) -> None:
    found = rows(tables.references_table(validated))["learned"]
    assert found[:3] == [0.5, 0.5, 0.0]
    assert found[3:] == [
        0.6,
        0.0,
        None,
        0.7,
        pytest.approx(0.71),
        *map(pytest.approx, (0.6, 0.8)),
        2,
    ]


def test_fidelity_is_told_overall_and_by_capability(validated: Run) -> None:
    found = rows(tables.fidelity_table(validated))
    assert found["utility of proxies"] == [6, 0.9, 0.4, 1.0, 0.8, None, None, 0.02]
    assert found["math-text"][1:4] == [None, None, None]
    assert "utility as predicted" not in found
    of, trained = ", of 4 that are no trials", "interval, really trained"
    assert rows(tables.choices_table(validated)) == {
        "regret of the best of the top 1": [0.03, 0.0, 0.1],
        f"share within the 0.5 {trained}{of}": [0.25, None, None],
        f"share within the 0.95 {trained}{of}": [1.0, None, None],
    }
    older = {n: part for n, part in VALIDATION["fidelity"].items() if n != "calibration_n"}
    run = Run(**{**vars(validated), "validation": {**VALIDATION, "fidelity": older}})
    assert f"share within the 0.5 {trained}" in rows(tables.choices_table(run))


def test_time_on_record_names_runs_trials_and_references(validated: Run) -> None:
    found = rows(measured_table(validated))
    trials = len(validated.trials)
    assert found["search: merge candidates"] == [trials, None, 0.25 * trials]
    assert found["search: evaluate candidates"] == [trials, None, 1.5 * trials]
    assert found["in all: references"] == [2, 200.0, None]


def test_a_diagnosis_and_references_are_drawn(run: Run) -> None:
    found = cosines_of(run)
    assert found is not None
    assert found[1][0, 1] == pytest.approx(0.3)
    assert found[2] == pytest.approx([2.0, 2.0, 2.0])
    diagnosis = {
        "experts": ["math", "code", "web"],
        "cosines": [[1, 0.5, 0.5], [0.5, 1, 0.5], [0.5, 0.5, 1]],
        "norms": [1, 2, 3],
        "curvature": {
            "math-text": {"gap": {"uniform": 0.1, "learned": None, "spread_ratio": 2.0}},
            "web-text": {"gap": None},
        },
        "verdict": {"regime": "beyond", "reasons": ["The gap is large."]},
    }
    diagnosed = Run(**{**vars(run), "diagnosis": diagnosis, "validation": VALIDATION})
    sections = {section.key: section for section in sections_of(diagnosed)}
    section = sections["task-vectors"]
    assert section.text == [
        "The experts are as those whose merges ranked mixtures badly in the study.",
        "The gap is large.",
    ]
    assert section.tables[0].rows[0][1:] == [1.0, 1.0, 0.5, 0.5]
    assert rows(section.tables[1]) == {
        "math-text": [0.1, None, None, None, 2.0, None],
        "web-text": [None] * 6,
    }
    (panel,) = sections["references"].drawings[0].panels
    assert "learned 0.7000 and 0.6000; uniform 0.4000 and 0.5000" in panel.alt
    assert "Rank correlation 1.00" in panel.alt
    assert sections["references"].text == ["Six references are few."]
