"""The page: one HTML file that needs nothing else, neither a network nor a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

from megatron_mergemix import __version__
from megatron_mergemix.report.content import Drawings, Section
from megatron_mergemix.report.drawing import svg
from megatron_mergemix.report.table import Cell, Table, are_numbers, column_names, exact, shown

WIDE = 12
"""A table with more columns is printed in smaller letters."""

LONG = 40
"""Characters; a longer text may fold."""


@dataclass(frozen=True)
class Tile:
    """One number of the summary.

    Attributes:
        name: what it is.
        value: as it is read.
        remark: below it.
    """

    name: str
    value: str
    remark: str = ""


@dataclass(frozen=True)
class Summary:
    """What stands on top.

    Attributes:
        title: of the page.
        lead: one sentence.
        tiles: the numbers that matter.
        notes: what a reader must know.
        missing: what the page lacks.
    """

    title: str
    lead: str
    tiles: Sequence[Tile]
    notes: Sequence[str]
    missing: Sequence[str]


def html_page(summary: Summary, sections: Sequence[Section]) -> str:
    """Return the whole page; the same bytes for the same arguments."""
    return "".join(_page(summary, sections))


def _page(summary: Summary, sections: Sequence[Section]) -> Iterator[str]:
    title = escape(summary.title)
    yield (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:\">\n"
        f'<title>{title}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>\n{_resource('page.css')}</style>\n</head>\n<body>\n"
    )
    yield f'<header>\n<h1>{title}</h1>\n<p class="lead">{escape(summary.lead)}</p>\n'
    yield from _summary(summary)
    yield '</header>\n<nav aria-label="Sections"><ul>\n'
    for section in sections:
        yield f'<li><a href="#{section.key}">{escape(section.title)}</a></li>\n'
    yield "</ul></nav>\n<main>\n"
    for section in sections:
        yield from _section(section)
    yield (
        f"</main>\n<footer>Made by megatron-mergemix {escape(__version__)}. Columns sort by their "
        "headers; CSV files hold every digit.</footer>\n"
        f"<script>\n{_resource('page.js')}</script>\n</body>\n</html>\n"
    )


def _resource(name: str) -> str:
    return files("megatron_mergemix.report").joinpath(name).read_text(encoding="utf-8")


def _summary(summary: Summary) -> Iterator[str]:
    if summary.tiles:
        yield '<dl class="tiles">\n'
        for tile in summary.tiles:
            remark = f"<small>{escape(tile.remark)}</small>" if tile.remark else ""
            value = f"{escape(tile.value)}{remark}"
            yield f"<div><dt>{escape(tile.name)}</dt><dd>{value}</dd></div>\n"
        yield "</dl>\n"
    if summary.notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in summary.notes)
        yield f'<ul class="notes" aria-label="Notes">{items}</ul>\n'
    yield from _missing(summary.missing)


def _missing(sentences: Sequence[str]) -> Iterator[str]:
    for sentence in sentences:
        yield f'<p class="missing">{escape(sentence)}</p>\n'


def _section(section: Section) -> Iterator[str]:
    yield f'<section id="{section.key}">\n<h2>{escape(section.title)}</h2>\n'
    for sentence in section.text:
        yield f"<p>{escape(sentence)}</p>\n"
    yield from _missing(section.missing)
    if section.code:
        yield f"<pre>{escape(section.code)}</pre>\n"
    if section.drawings:
        yield '<div class="figures">\n'
        for drawings in section.drawings:
            yield from _figure(drawings)
        yield "</div>\n"
    for table in section.tables:
        yield from _table(table)
    yield "</section>\n"


def _figure(drawings: Drawings) -> Iterator[str]:
    kind = ' class="many"' if len(drawings.panels) > 1 else ""
    yield f'<figure{kind}>\n<div class="panels">\n'
    for panel in drawings.panels:
        yield f"{svg(panel)}\n"
    yield f"</div>\n<figcaption>{escape(drawings.caption)}</figcaption>\n</figure>\n"


def _table(table: Table) -> Iterator[str]:
    key = f"table-{table.key}"
    yield (
        f'<div class="table">\n<div class="bar"><h3 id="{key}-title">{escape(table.caption)}</h3>'
        f'<button type="button" class="csv" data-table="{key}" hidden '
        f'aria-label="Download {escape(table.caption)} as CSV">CSV</button></div>\n'
        f'<div class="scroll" tabindex="0" role="region" aria-labelledby="{key}-title">'
        f'<table id="{key}" aria-labelledby="{key}-title"'
        f"{' class=wide' if len(table.columns) > WIDE else ''}>\n<thead><tr>"
    )
    for place, (column, name) in enumerate(zip(table.columns, column_names(table), strict=True)):
        kind = ' class="number"' if place > 0 and are_numbers(table, place) else ""
        whole = "" if name == column else f' data-name="{escape(name)}"'
        button = f'<button type="button">{escape(column)}</button>'
        yield f'<th scope="col"{kind}{whole} aria-sort="none">{button}</th>'
    yield "</tr></thead>\n<tbody>\n"
    for row in table.rows:
        first, *others = row
        cells = "".join(map(_cell, others))
        yield f'<tr><th scope="row"{_value(first)}>{escape(shown(first))}</th>{cells}</tr>\n'
    yield "</tbody></table></div>\n</div>\n"


def _cell(cell: Cell) -> str:
    is_text = isinstance(cell, str)
    kind = (' class="long"' if len(str(cell)) > LONG else "") if is_text else ' class="number"'
    return f"<td{kind}{_value(cell)}>{escape(shown(cell))}</td>"


def _value(cell: Cell) -> str:
    """Return the attribute with every digit, where the text does not have them."""
    return "" if isinstance(cell, str) else f' data-value="{exact(cell)}"'
