"""The scalars and figures of a report for TensorBoard, written without torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from megatron_mergemix.files.event_files import Scalar, replace_events
from megatron_mergemix.report.content import Section
from megatron_mergemix.report.drawing import Panel, png
from megatron_mergemix.report.gather import Run
from megatron_mergemix.report.table import column_names, row_names


def write_events(run: Run, sections: Sequence[Section]) -> None:
    """Replace the TensorBoard folder ``report`` by what the page shows now.

    Raises:
        OSError: the folder cannot be written.
    """
    images = ((tag, png(panel)) for tag, panel in _panels(sections))
    numbers = chain(_recommended(run), _of_tables(sections))
    replace_events(run.run_dir.tensorboard("report"), numbers, images)


def _recommended(run: Run) -> Iterator[Scalar]:
    """Yield what the page says above its tables."""
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


def _of_tables(sections: Sequence[Section]) -> Iterator[Scalar]:
    """Yield every number in a table of the page as ``table/row/column``, trials by their step."""
    for table in (table for section in sections for table in section.tables):
        columns, rows = column_names(table), row_names(table)
        for row, (first, *cells) in zip(rows, table.rows, strict=True):
            for column, cell in zip(columns[1:], cells, strict=True):
                if isinstance(cell, str) or cell is None:
                    continue
                if table.key == "trials" and isinstance(first, int):
                    yield f"trials/{column}", float(cell), first
                else:
                    yield f"{table.key}/{row}/{column}", float(cell), 0


def _panels(sections: Sequence[Section]) -> Iterator[tuple[str, Panel]]:
    for section in sections:
        for drawings in section.drawings:
            for panel in drawings.panels:
                yield f"{section.key}/{panel.key}", panel
