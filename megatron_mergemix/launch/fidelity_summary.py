"""What ends ``mergemix validate``: how well merges rank mixtures, and what each side has cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from megatron_mergemix.console import console


def print_fidelity(result: Mapping[str, Any]) -> None:
    """Print the fidelity of proxies and the cost of both sides.

    Args:
        result: see :mod:`megatron_mergemix.validation.fidelity`.
    """
    terminal = console()
    fidelity = result["fidelity"]
    terminal.print(_agreement(fidelity))
    for line in (*_regret(fidelity), *_calibration(fidelity)):
        terminal.print(line, soft_wrap=True)
    terminal.print(_costs(result["costs"]))
    for note in result["notes"]:
        terminal.print(f"note: {note}", soft_wrap=True)


def _agreement(fidelity: Mapping[str, Any]) -> Table:
    count = fidelity["overall"]["n"]
    table = Table(title=f"do merges rank {count} mixtures as models that are really trained do?")
    table.add_column("score")
    for column in ("Spearman", "Kendall"):
        table.add_column(column, justify="right")
        table.add_column("95 % interval", justify="right")
    for column in ("mean error", "merges above by", "error without that"):
        table.add_column(column, justify="right")
    _add_row(table, "utility", fidelity["overall"], end_section=True)
    for name, part in fidelity["capabilities"].items():
        _add_row(table, name, part)
    if fidelity["surrogate"] is not None:
        table.add_section()
        _add_row(table, "predicted utility", fidelity["surrogate"])
    return table


def _add_row(table: Table, name: str, part: Mapping[str, Any], end_section: bool = False) -> None:
    cells = []
    for correlation in ("spearman", "kendall"):
        interval = part[f"{correlation}_interval"]
        cells += [
            "-" if part[correlation] is None else f"{part[correlation]:.3f}",
            "-" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}",
        ]
    errors = ("mean_absolute_error", "offset", "centred_error")
    table.add_row(name, *cells, *(f"{part[e]:.4f}" for e in errors), end_section=end_section)


def _regret(fidelity: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is lost by really training the proxies' best alone; nothing where none is left."""
    parts = []
    for k, found in fidelity["top_k"].items():
        if found["regret"] is None:
            continue
        interval = found["interval"]
        up_to = "" if interval is None else f" ({interval[0]:.4f} to {interval[1]:.4f})"
        parts.append(f"of {k} {found['regret']:.4f}{up_to}")
    if parts:
        yield (
            "utility lost by really training only what merges put first, and keeping the best "
            f"(95 % interval): {', '.join(parts)}"
        )


def _calibration(fidelity: Mapping[str, Any]) -> Iterator[str]:
    """Yield which share of the references each sort of interval holds."""
    if fidelity["calibration"] is None:
        return
    levels = ", ".join(f"{100 * float(level):.0f}" for level in fidelity["calibration"])
    count = fidelity["calibration_n"]
    yield f"the surrogate's intervals of {levels} % hold, of {count} mixtures that are no trials,"
    for name, what in (
        ("calibration_of_merges", "of the merges, which they are meant for"),
        ("calibration", "of the really trained models"),
        ("calibration_shifted", "of those, without the mean gap of the others"),
    ):
        if fidelity[name] is not None:
            shares = ", ".join(f"{100 * share:.0f}" for share in fidelity[name].values())
            yield f"  {shares} % {what}"


def _costs(costs: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title="what each side has cost")
    table.add_column("side")
    for column in ("runs", "training tokens", "training", "scoring", "together"):
        table.add_column(column, justify="right")
    for name, side in costs.items():
        seconds = (side[key] for key in ("training_seconds", "scoring_seconds", "seconds"))
        runs, tokens = str(side["runs"]), f"{side['tokens']:.4g}"
        table.add_row(name, runs, tokens, *(_time(value) for value in seconds))
    return table


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.1f} s" if seconds < 600 else f"{seconds / 3600:.2f} h"
