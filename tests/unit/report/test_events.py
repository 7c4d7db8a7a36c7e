"""TensorBoard has the numbers and drawings of the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_mergemix.cli import main
from megatron_mergemix.report.content import sections_of
from megatron_mergemix.report.gather import Run, read_run
from megatron_mergemix.report.table import column_names, row_names


@pytest.fixture
def events(finished: Path, page: str) -> Any:
    return written_of(finished)


def written_of(path: Path) -> Any:
    found = EventAccumulator(str(path.parent / "run" / "tensorboard" / "report"))
    return found.Reload()


def test_every_trial_has_its_utility_at_its_own_step(run: Run, events: Any) -> None:
    assert run.scale is not None
    written = {event.step: event.value for event in events.Scalars("trials/utility")}
    expected = {t.index: run.utility.of_trial(t.scores, run.scale).value for t in run.scored}
    assert {step: written[step] for step in expected} == pytest.approx(expected, rel=1e-6)


def test_the_learned_mixture_and_what_speaks_for_it_are_there(run: Run, events: Any) -> None:
    assert run.result is not None
    found = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    for name, share in run.result["mixture"].items():
        assert found[f"learned/mixture/{name}"] == pytest.approx(share, rel=1e-6)
    assert found["learned/utility_low"] == pytest.approx(run.result["interval"][0], rel=1e-6)


def test_every_number_of_every_table_of_the_page_is_there(measured: Path) -> None:
    assert main(["report", str(measured)]) == 0
    events = written_of(measured)
    run = read_run(measured)
    found = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    tables = [table for section in sections_of(run) for table in section.tables]
    assert {table.key for table in tables} == {
        *("blend", "candidates", "capabilities", "choices", "costs", "curvature", "digests"),
        *("fidelity", "held-out", "references", "seconds", "settings", "surrogates"),
        *("task-vectors", "trials"),
    }
    written = 0
    for table in tables:
        rows, columns = row_names(table), column_names(table)
        assert len(set(rows)) == len(rows), table.key
        assert len(set(columns)) == len(columns), table.key
        for name, (_, *cells) in zip(rows, table.rows, strict=True):
            for column, cell in zip(columns[1:], cells, strict=True):
                if table.key != "trials" and isinstance(cell, int | float):
                    tag = f"{table.key}/{name}/{column}"
                    assert found[tag] == pytest.approx(cell, rel=1e-6), tag
                    written += 1
    assert written > 500
    assert run.validation is not None
    low, high = run.validation["fidelity"]["overall"]["kendall_interval"]
    assert found["fidelity/utility of proxies/Kendall, from"] == pytest.approx(low, rel=1e-6)
    assert found["fidelity/utility of proxies/Kendall, to"] == pytest.approx(high, rel=1e-6)
    by_trial = {event.step: event.value for event in events.Scalars("trials/share of math")}
    shares = {trial.index: trial.mixture["math"] for trial in run.trials if trial.mixture}
    assert by_trial == pytest.approx(shares, rel=1e-6)


def test_every_drawing_is_an_image(page: str, events: Any) -> None:
    tags = events.Tags()["images"]
    assert len(tags) == page.count("<svg ")
    assert "mixtures/plane" in tags
    assert events.Images("mixtures/plane")[0].encoded_image_string.startswith(b"\x89PNG")
