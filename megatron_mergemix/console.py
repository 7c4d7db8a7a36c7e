"""The terminal that tables are printed to."""

from __future__ import annotations

import sys

from rich.console import Console

WIDTH = 160
"""Columns in a log or a pipe, which has no width of its own: no table has to fold its words."""


def console() -> Console:
    """Return standard output, which prints text as it is: brackets and colons are no markup."""
    width = None if sys.stdout.isatty() else WIDTH
    return Console(highlight=False, markup=False, emoji=False, width=width)
