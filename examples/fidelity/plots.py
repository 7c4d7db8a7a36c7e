"""Plots of the study, as SVG that is the same for the same numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
from findings import Row, Tables
from variants import DEFAULT, PAPER, by_budget, by_share

matplotlib.use("Agg")
matplotlib.rcParams |= {"svg.hashsalt": "mergemix", "font.size": 9, "axes.grid": True}
from matplotlib import pyplot  # noqa: E402  the backend comes first

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
"""Of Okabe and Ito: told apart by those who see fewer colours."""


def write_plots(tables: Tables, folder: Path) -> Iterator[tuple[str, str]]:
    """Write what there are numbers for; yield the file's name and what it shows."""
    points = [
        row for row in tables["points"] if row["domains"] == 4 and row["references"] == "same"
    ]
    if any(row["variant"] == DEFAULT.name for row in points):
        _scatter(points, folder / "scatter.svg")
        yield "scatter.svg", "score of the merge against score of the really trained model, by seed"
    agreement = [row for row in tables["agreement"] if _is_main(row) and row["merge"] == "affine"]
    shares = {variant.name: variant.share for variant in by_share()}
    if len({row["variant"] for row in agreement} & set(shares)) > 2:
        _curve(agreement, shares, "share of general data in the experts", folder / "shares.svg")
        yield "shares.svg", "rank correlation against the share of general data, by seed"
    rates = {
        variant.name: variant.lr for variant in by_budget() if variant.tokens == DEFAULT.tokens
    }
    if len({row["variant"] for row in agreement} & set(rates)) > 2:
        _curve(agreement, rates, "learning rate of the experts", folder / "lr.svg", log=True)
        yield "lr.svg", "rank correlation against the learning rate of the experts, by seed"


def _is_main(row: Row) -> bool:
    """Return whether it is about the main testbed."""
    return row["domains"] == 4 and row["references"] == "same"


def _scatter(points: Sequence[Row], path: Path) -> None:
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.8), sharey=True)
    for axis, (variant, title) in zip(
        axes, ((DEFAULT.name, "defaults"), (PAPER.name, "as in the paper")), strict=True
    ):
        rows = [r for r in points if r["variant"] == variant and r["merge"] == "affine"]
        for color, seed in zip(cycle(COLORS), sorted({row["seed"] for row in rows})):
            mine = [row for row in rows if row["seed"] == seed]
            axis.scatter(
                [row["proxy"] for row in mine],
                [row["trained"] for row in mine],
                s=14,
                color=color,
                label=f"seed {seed}",
            )
        axis.set(title=title, xlabel="merge, bits per byte")
    axes[0].set_ylabel("really trained, bits per byte")
    axes[0].legend()
    _save(figure, path)


def _curve(
    rows: Sequence[Row], positions: dict[str, float], label: str, path: Path, log: bool = False
) -> None:
    figure, axis = pyplot.subplots(figsize=(5, 3.4))
    names = sorted(positions, key=positions.__getitem__)
    for color, seed in zip(cycle(COLORS), sorted({row["seed"] for row in rows})):
        found = {row["variant"]: row["spearman"] for row in rows if row["seed"] == seed}
        there = [name for name in names if name in found]
        axis.plot(
            [positions[name] for name in there],
            [found[name] for name in there],
            marker="o",
            color=color,
            label=f"seed {seed}",
        )
    if log:
        axis.set_xscale("log")
    axis.set(xlabel=label, ylabel="rank correlation")
    axis.legend()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
