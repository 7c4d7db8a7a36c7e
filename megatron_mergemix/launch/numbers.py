"""Measured numbers as all verbs print them."""

from __future__ import annotations


def number(value: float | None) -> str:
    """Return four decimals; a dash where nothing was measured."""
    return "-" if value is None else f"{value:.4f}"


def with_error(value: float | None, stderr: float | None) -> str:
    """Return a value and its standard error, where that is known."""
    return number(value) if stderr is None else f"{value:.4f} +- {stderr:.4f}"
