"""Drawings of models: capability profiles, left-out predictions, task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_mergemix.mixtures.simplex import Array
from megatron_mergemix.report.drawing import (
    BLUE,
    GREEN,
    MUTED,
    ORANGE,
    SIGNED_SCALE,
    Panel,
    new_axes,
    styled,
)
from megatron_mergemix.report.gather import Model
from megatron_mergemix.report.surface import LeftOut
from megatron_mergemix.search.surrogates.choose import spearman

DEVIATIONS = 1.96
"""Standard errors on either side of a bar: 95 %."""

COLOURS = {"learned": BLUE, "uniform": ORANGE, "proportional": GREEN}
"""Of the models that every experiment has."""


@styled
def profile_panel(place: int, capability: str, metric: str, found: Sequence[Model]) -> Panel:
    """Return one capability of all compared models, with errors.

    Args:
        place: of the capability, for the key.
        capability: its name.
        metric: that is shown.
        found: the models; those without the score are left out.
    """
    scored = [(m.name, m.scores[capability][metric]) for m in found if capability in m.scores]
    first = scored[0][1]
    figure, axes = new_axes(3.5, 0.95 + 0.24 * len(scored), capability)
    places = np.arange(len(scored))[::-1]
    for at, (name, score) in zip(places, scored, strict=True):
        error = 0.0 if score.stderr is None else DEVIATIONS * score.stderr
        colour = COLOURS.get(name, MUTED)
        axes.errorbar(score.value, at, xerr=error, color=colour, marker="o", markersize=5,
                      elinewidth=1.4)  # fmt: skip
    axes.set_yticks(places, [name for name, _ in scored])
    axes.set_ylim(-0.6, len(scored) - 0.4)
    better = "higher is better" if first.higher_is_better else "lower is better"
    axes.set_xlabel(f"{first.unit}, {better}")
    axes.locator_params(axis="x", nbins=5)
    axes.grid(False, axis="y")
    told = ", ".join(f"{name} {score.value:.4g}" for name, score in scored)
    return Panel(f"profile-{place}", f"{capability} ({first.unit}, {better}): {told}.", figure)


@styled
def left_out_panel(place: int, found: LeftOut) -> Panel:
    """Return measured against predicted scores of trials that were left out."""
    figure, axes = new_axes(2.9, 2.9, found.name)
    rank = spearman(found.predicted, found.measured)
    error = float(np.sqrt(np.mean((found.predicted - found.measured) ** 2)))
    diagonal(axes, found.measured, found.predicted)
    axes.scatter(found.measured, found.predicted, s=20, color=BLUE, alpha=0.8, linewidths=0)
    law = f" ({found.surrogate})" if found.surrogate else ""
    axes.set_xlabel(f"measured, {found.unit}\nSpearman {rank:.2f}, RMSE {error:.3g}{law}")
    axes.set_ylabel("predicted without it")
    axes.locator_params(nbins=4)
    alt = (
        f"{found.name}: {len(found.measured)} trials, each predicted from all others. Rank "
        f"correlation {rank:.2f}, root mean square error {error:.3g} {found.unit}."
    )
    return Panel(f"left-out-{place}", alt, figure)


@styled
def cosines_panel(experts: Sequence[str], cosines: Array) -> Panel:
    """Return how far the experts' task vectors point the same way."""
    import matplotlib

    count = len(experts)
    middles = np.arange(count) + 0.5
    size = max(3.2, min(5.2, 1.6 + 0.5 * count))
    figure, axes = new_axes(size, size)
    axes.pcolormesh(cosines, cmap=SIGNED_SCALE, vmin=-1, vmax=1)  # unlike imshow's, no bitmap
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.set_xticks(middles, experts, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(middles, experts)
    axes.grid(False)
    colours = matplotlib.colormaps[SIGNED_SCALE]((cosines + 1) / 2)
    brightness = colours[..., :3] @ np.array([0.299, 0.587, 0.114])
    if count <= 12:
        for row, column in np.ndindex(count, count):
            ink = "black" if brightness[row, column] > 0.5 else "white"
            text = f"{cosines[row, column]:.2f}"
            axes.text(
                middles[column],
                middles[row],
                text,
                ha="center",
                va="center",
                color=ink,
                fontsize=8.5,
            )
    others = cosines[~np.eye(count, dtype=bool)]
    told = f" between {np.min(others):.2f} and {np.max(others):.2f}" if len(others) else ""
    return Panel("cosines", f"Cosines of the task vectors of {', '.join(experts)}:{told}.", figure)


def diagonal(axes: Any, first: Array, second: Array) -> None:
    """Draw the line on which both numbers agree."""
    both = np.concatenate([first, second])
    ends = [float(both.min()), float(both.max())]
    axes.plot(ends, ends, color=MUTED, linewidth=1.0, linestyle="dashed", zorder=1)
