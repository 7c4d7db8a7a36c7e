"""The scalars and figures of a report for TensorBoard, written without torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_mergemix.event_files import Scalar, replace_events
from megatron_mergemix.report import tables
from megatron_mergemix.report.content import Section
from megatron_mergemix.report.drawing import Panel, png
from megatron_mergemix.report.gather import Run


def write_events(run: Run, sections: Sequence[Section]) -> None:
    """Replace the TensorBoard folder ``report`` by what the page shows now.

    Raises:
        OSError: the folder cannot be written.
    """
    images = ((tag, png(panel)) for tag, panel in _panels(sections))
    replace_events(run.run_dir.tensorboard("report"), scalars(run), images)


def scalars(run: Run) -> Iterator[Scalar]:
    """Yield the numbers of the page: by trial where there is one, else at step 0."""
    for trial in run.scored:
        if run.scale is not None:
            yield "trials/utility", run.utility.of_trial(trial.scores, run.scale).value, trial.index
    result = run.result
    if result is None:
        return
    yield "learned/utility", result["utility"], 0
    yield "learned/utility_low", result["interval"][0], 0
    yield "learned/utility_high", result["interval"][1], 0
    for name, chance in result["better_than"].items():
        yield f"learned/better_than/{name}", chance, 0
    for name, share in result["mixture"].items():
        yield f"learned/mixture/{name}", share, 0
    table = tables.domains_table(run)
    column = list(table.columns).index(tables.EPOCHS)
    for row in table.rows:
        if isinstance(count := row[column], float):
            yield f"learned/epochs/{row[0]}", count, 0
    for name, evidence in result["surrogates"].items():
        yield f"surrogates/spearman/{name}", evidence["spearman"], 0
        yield f"surrogates/rmse/{name}", evidence["rmse"], 0
    for row in [] if run.validation is None else run.validation["references"]:
        yield f"references/{row['name']}", row["utility"], 0


def _panels(sections: Sequence[Section]) -> Iterator[tuple[str, Panel]]:
    for section in sections:
        for drawings in section.drawings:
            for panel in drawings.panels:
                yield f"{section.key}/{panel.key}", panel
