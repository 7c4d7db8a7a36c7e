"""Rows that go on from one context: the choices of a question, whose context is run once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

Row = tuple[int, ...]

_LEAST_SHARED = 16
"""Tokens that a context has at least; a shorter one is not worth a pass of its own."""

_MOST_ROWS = 8
"""Rows of a family, each of which is a pass of its own over a micro-batch of families."""


class Family(NamedTuple):
    """Rows that begin with the same tokens.

    Attributes:
        rows: all their tokens, longest first.
        shared: how many tokens all begin with, and are run once for all; 0 for a row that is run
            by itself.
    """

    rows: tuple[Row, ...]
    shared: int


def by_itself(row: Row) -> Family:
    """Return the family of a row that shares nothing."""
    return Family((row,), 0)


def families(asked: Sequence[tuple[Row, int]], home: Mapping[Row, Row]) -> list[Family]:
    """Return the rows that are run, in families where a context is common to several.

    Args:
        asked: of every request, its tokens without the last and how many of them are context.
        home: of each of these tokens, the row that is run for them and begins with them.
    """
    common: dict[Row, dict[Row, None]] = {}
    for tokens, length in asked:
        if length >= _LEAST_SHARED:
            common.setdefault(tokens[:length], {})[home[tokens]] = None
    found: list[Family] = []
    taken: set[Row] = set()
    # A context within another one gets what that one leaves.
    for context, candidates in sorted(common.items(), key=lambda each: -len(each[0])):
        rows = sorted(candidates.keys() - taken, key=lambda row: (-len(row), row))
        if len(rows) > 1:
            bounds = _even_cuts(len(rows))
            found += [Family(tuple(rows[a:b]), len(context)) for a, b in pairwise(bounds)]
            taken.update(rows)
    return found + [by_itself(row) for row in set(home.values()) - taken]


def _even_cuts(count: int) -> list[int]:
    parts = -(-count // _MOST_ROWS)
    return [count * part // parts for part in range(parts + 1)]


def fixed_order(found: Sequence[Family]) -> list[Family]:
    """Return families in the order in which they fill micro-batches: neighbours are alike."""
    return sorted(found, key=lambda each: (-len(each.rows), -each.shared, _falling(each.rows)))


def _falling(rows: Sequence[Row]) -> list[tuple[int, Row]]:
    return [(-len(row), row) for row in rows]
