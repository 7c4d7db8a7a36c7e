"""Drawings of mixtures: the surface over the simplex, lines through its optimum, the blend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_mergemix.mixtures.simplex import Array
from megatron_mergemix.report.drawing import (
    BLUE,
    GREEN,
    INK,
    LINE,
    MUTED,
    ORANGE,
    PAPER,
    SCALE,
    Panel,
    new_axes,
    styled,
)
from megatron_mergemix.report.gather import Run
from megatron_mergemix.report.surface import Line, Plane, Surface
from megatron_mergemix.report.table import Table
from megatron_mergemix.search.uncertainty import SURE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.tri import Triangulation

NEAR = 0.1
"""Trials of which less than that share of tokens would have to change lie near a line or plane."""

_HEIGHT = 3**0.5 / 2
_CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, _HEIGHT]])


@styled
def plane_panel(run: Run, surface: Surface, plane: Plane) -> Panel:
    """Return the ternary: expected utility, trials, optimum, and what is as good."""
    from matplotlib.tri import Triangulation

    names = [run.domains[place] for place in plane.domains]
    figure, axes = new_axes(3.9, 4.25)
    axes.set_axis_off()
    axes.set_aspect("equal")
    spots = plane.corners @ _CORNERS
    mesh = Triangulation(spots[:, 0], spots[:, 1])
    mesh.set_mask(~plane.allowed[mesh.triangles].all(axis=1))
    inside = plane.mean[plane.allowed]
    least, most = float(np.min(inside)), float(np.max(inside))
    levels = np.linspace(least, max(most, least + 1e-9), 25)
    filled = axes.tricontourf(mesh, plane.mean, levels=levels, cmap=SCALE)
    filled.set_edgecolor("face")  # else thin seams show between the levels
    axes.plot(*np.vstack([_CORNERS, _CORNERS[:1]]).T, color=MUTED, linewidth=0.8)
    _region(axes, mesh, plane.chance)
    _trials(axes, surface, plane, levels)
    optimum = surface.optimum[list(plane.domains)]
    at = optimum / optimum.sum() @ _CORNERS
    axes.plot(*at, marker="*", markersize=15, color="white", markeredgecolor="black", zorder=6)
    _corner_names(axes, names, 1.0 - plane.rest)
    bar = figure.colorbar(filled, ax=axes, orientation="horizontal", shrink=0.85, pad=0.02)
    bar.set_label("expected utility", color=INK)
    bar.ax.tick_params(labelsize=8.5, colors=MUTED, labelcolor=INK)
    bar.set_ticks(levels[::8].tolist(), labels=[f"{level:.3f}" for level in levels[::8]])
    bar.outline.set_visible(False)
    shares = ", ".join(f"{n} {share:.3f}" for n, share in zip(names, optimum, strict=True))
    good = float((plane.chance[plane.allowed] < SURE).mean())
    alt = (
        f"Ternary of {', '.join(names)}. Expected utility runs from {levels[0]:.3f} to "
        f"{levels[-1]:.3f}; the star is the optimum, {shares}. {100 * good:.0f} % of the drawn "
        "mixtures are as good within noise and lie inside the dashed line."
    )
    return Panel("plane", alt, figure)


def _region(axes: Axes, mesh: Triangulation, chance: Array) -> None:
    """Draw the edge of what is as good within noise, dark on bright so that it shows anywhere."""
    if np.min(chance) < SURE < np.max(chance):
        axes.tricontour(mesh, chance, levels=[SURE], colors="black", linewidths=3.0)
        axes.tricontour(
            mesh, chance, levels=[SURE], colors="white", linewidths=1.5, linestyles="dashed"
        )


def _trials(axes: Axes, surface: Surface, plane: Plane, levels: Array) -> None:
    known = ~np.isnan(plane.trials[:, 0])
    x, y = (plane.trials[known] @ _CORNERS).T
    measured = surface.measured[known]
    near = plane.distances[known] <= NEAR
    edge: dict[str, Any] = {"edgecolors": "black", "linewidths": 0.7, "clip_on": False}
    axes.scatter(x[~near], y[~near], s=9, color="white", zorder=4, **edge)
    axes.scatter(x[near], y[near], s=66, color="white", zorder=5, **edge)
    axes.scatter(x[near], y[near], s=36, c=measured[near], linewidths=0, zorder=5, cmap=SCALE,
                 vmin=levels[0], vmax=levels[-1], clip_on=False)  # fmt: skip


def _corner_names(axes: Axes, names: list[str], total: float) -> None:
    top = "" if total > 1 - 1e-9 else f" {total:.2f}"
    places = ((0, "left", "top", -0.03), (1, "right", "top", -0.03), (2, "center", "bottom", 0.03))
    for place, across, along, gap in places:
        x, y = _CORNERS[place]
        axes.text(x, y + gap, names[place] + top, ha=across, va=along, fontsize=10, weight="bold")
    axes.set_xlim(-0.04, 1.04)
    axes.set_ylim(-0.1, _HEIGHT + 0.1)


@styled
def line_panel(run: Run, surface: Surface, line: Line) -> Panel:
    """Return the utility along one line through the optimum."""
    name = run.domains[line.domain]
    figure, axes = new_axes(3.5, 2.7, name)
    axes.fill_between(line.shares, line.low, line.high, color=BLUE, alpha=0.18, linewidth=0)
    axes.plot(line.shares, line.mean, color=BLUE, linewidth=1.8)
    at = surface.points[:, line.domain]
    near = line.distances <= NEAR
    axes.scatter(at[near], surface.measured[near], s=22, color=ORANGE, zorder=4)
    axes.scatter(at[~near], surface.measured[~near], s=11, facecolors="none", edgecolors=MUTED)
    optimum = float(surface.optimum[line.domain])
    axes.axvline(optimum, color=INK, linewidth=1.0, linestyle="dotted")
    good = line.chance < SURE
    bottom = axes.get_ylim()[0]
    axes.set_ylim(bottom=bottom)
    axes.scatter(line.shares[good], np.full(good.sum(), bottom), s=18, marker="s", color=GREEN,
                 clip_on=False, zorder=5, linewidths=0)  # fmt: skip
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel(f"share of {name}")
    axes.set_ylabel("utility")
    as_good = line.shares[good]
    span = f"{np.min(as_good):.2f} to {np.max(as_good):.2f}" if len(as_good) else "nowhere else"
    alt = (
        f"Utility along the share of {name}, the other domains in the optimum's proportions. "
        f"Optimum at {optimum:.3f}; as good within noise: {span}; expected utility from "
        f"{np.min(line.mean):.3f} to {np.max(line.mean):.3f}."
    )
    return Panel(f"line-{line.domain}", alt, figure)


@styled
def blend_panel(table: Table) -> Panel:
    """Return learned, proportional and equal shares by domain, with the range that is as good."""
    rows = table.rows
    figure, axes = new_axes(4.0, 1.15 + 0.34 * len(rows))
    places = np.arange(len(rows))[::-1]
    columns = list(zip(*rows, strict=True))
    names = [str(name) for name in columns[0]]
    proportional, learned, least, largest, epochs = (
        np.array([np.nan if cell is None else cell for cell in columns[place]], dtype=np.float64)
        for place in (2, 3, 4, 5, 6)
    )
    axes.hlines(places, least, largest, color=BLUE, alpha=0.3, linewidth=7, label="as good")
    axes.axvline(1 / len(rows), color=MUTED, linewidth=1.0, linestyle="dotted", label="uniform")
    axes.scatter(proportional, places, marker="D", s=30, facecolors=PAPER, edgecolors=ORANGE,
                 linewidths=1.5, label="proportional", zorder=3)  # fmt: skip
    axes.scatter(learned, places, s=44, color=BLUE, label="learned", zorder=4)
    for place, count in zip(places, epochs, strict=True):
        if np.isfinite(count):
            axes.annotate(f"{count:.3g} epochs", (1.0, place), xycoords=("axes fraction", "data"),
                          xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5,
                          annotation_clip=False)  # fmt: skip
    axes.set_yticks(places, names)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlim(left=-0.01)
    axes.set_xlabel("share of training tokens")
    axes.grid(False, axis="y")
    axes.spines["left"].set_color(LINE)
    figure.legend(loc="outside upper left", ncols=4, handletextpad=0.4, columnspacing=1.0)
    told = "; ".join(
        f"{name} {share:.3f}" + (f", {count:.3g} epochs" if np.isfinite(count) else "")
        for name, share, count in zip(names, learned, epochs, strict=True)
    )
    return Panel("blend", f"Learned share by domain: {told}.", figure)
