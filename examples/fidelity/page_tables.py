"""Markdown tables of the study's page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from findings import Row, Tables, interval

from megatron_mergemix.validation.rank_fidelity import spearman

Key = tuple[object, ...]


def about(variant: str, merge: str) -> Row:
    """Return what tells the rows of a variant and a way to merge from others."""
    return {"domains": 4, "references": "same", "variant": variant, "merge": merge}


def agreements(
    tables: Tables,
    title: str,
    wanted: Sequence[tuple[str, Row]],
    note: str = "",
    least: int = 2,
) -> Iterator[str]:
    """Yield a table of those that were measured; nothing where fewer than ``least`` were."""
    body = []
    columns: list[str] = []
    for text, what in wanted:
        rows = [r for r in tables["agreement"] if all(r[key] == v for key, v in what.items())]
        if not rows:
            continue
        names = [key for key in rows[0] if key.startswith("spearman ")]
        domains = [n.removeprefix("spearman ") for n in names if n not in BOUNDS]
        columns = ["", "rho", "by seed", "interval", *domains, "error", "regret"]
        mean = {key: np.mean([r[key] for r in rows]) for key in rows[0] if _is_number(rows[0][key])}
        low, high = interval(_pairs(tables["points"], what), spearman)
        body.append(
            [
                text,
                f"**{mean['spearman']:.2f}**",
                " ".join(f"{row['spearman']:.2f}" for row in rows),
                f"{low:.2f} to {high:.2f}",
                *(f"{mean[f'spearman {domain}']:.2f}" for domain in domains),
                f"{mean['centred error']:.4f}",
                f"{mean['regret top 1']:.4f}",
            ]
        )
    if len(body) >= least:
        yield from (f"## {title}", "", *([note, ""] if note else []))
        yield from table(columns, body)


BOUNDS = ("spearman low", "spearman high")


def _pairs(points: Sequence[Row], what: Row) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (merges, trained) of every seed, higher is better."""
    rows = [row for row in points if all(row[key] == value for key, value in what.items())]
    return [
        (-np.array([r["proxy"] for r in found]), -np.array([r["trained"] for r in found]))
        for found in grouped(rows, lambda row: (row["seed"],)).values()
    ]


def grouped(rows: Sequence[Row], key: Callable[[Row], Key]) -> dict[Key, list[Row]]:
    """Return rows by key, in their order."""
    found: dict[Key, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def table(columns: Sequence[str], body: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table, and an empty one."""
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    for cells in body:
        yield f"| {' | '.join(cells)} |"
    yield ""
