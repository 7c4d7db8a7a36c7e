"""A table as plain data: what a page, a CSV file and a terminal have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

Cell = str | int | float | None
"""None is a number that is not known, or does not apply."""


@dataclass(frozen=True)
class Table:
    """Rows below a header.

    Attributes:
        key: a word for names of files and anchors.
        caption: what it shows, for people.
        columns: headers; the first column names the row.
        rows: as long as ``columns`` each.
    """

    key: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def are_numbers(table: Table, column: int) -> bool:
    """Return whether a column holds numbers, as far as they are known."""
    return not any(isinstance(row[column], str) for row in table.rows)


def column_names(table: Table) -> list[str]:
    """Return names of the columns, each once: an error or a bound with what it belongs to."""
    counts = Counter(table.columns)
    names: list[str] = []
    owner = ""
    for column in table.columns:
        owner = column if counts[column] == 1 else owner
        names.append(column if counts[column] == 1 else f"{owner}, {column}")
    return names


def row_names(table: Table) -> list[str]:
    """Return names of the rows, each once: with the second column where the first is not enough."""
    firsts = [str(row[0]) for row in table.rows]
    if len(set(firsts)) == len(firsts):
        return firsts
    return [f"{row[0]}, {row[1]}" for row in table.rows]


def shown(cell: Cell) -> str:
    """Return a cell as people read it."""
    if cell is None:
        return "–"
    if isinstance(cell, (bool, str)):
        return str(cell)
    if isinstance(cell, int):
        return f"{cell:,}"
    size = abs(cell)
    if size >= 1000 and cell == int(cell) and size < 1e10:
        return f"{cell:,.0f}"
    if size == 0 or 1e-4 <= size < 1e5:
        return f"{cell:,.4f}" if size < 1000 else f"{cell:,.1f}"
    return f"{cell:.3g}"


def exact(cell: Cell) -> str:
    """Return a cell as programs read it: every digit, nothing where nothing is known."""
    if cell is None:
        return ""
    return repr(cell) if isinstance(cell, float) else str(cell)
