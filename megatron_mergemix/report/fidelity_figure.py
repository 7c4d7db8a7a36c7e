"""The drawing of rank fidelity: proxies against the models really trained on their mixtures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_mergemix.config.validation import is_filling
from megatron_mergemix.mixtures.simplex import Array
from megatron_mergemix.report.drawing import MUTED, PURPLE, Panel, new_axes, styled
from megatron_mergemix.report.model_figures import COLOURS, diagonal
from megatron_mergemix.search.surrogates.choose import spearman

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

_PLACES = (
    *((7, 0, "left", "center"), (-7, 0, "right", "center")),
    *((0, 7, "center", "bottom"), (0, -7, "center", "top")),
    *((6, 5, "left", "bottom"), (-6, 5, "right", "bottom")),
    *((6, -5, "left", "top"), (-6, -5, "right", "top")),
    *((6, 16, "left", "bottom"), (-6, 16, "right", "bottom")),
    *((6, -16, "left", "top"), (-6, -16, "right", "top")),
)
"""Where a label may stand from its mark, in points, and which of its ends is there."""


@styled
def fidelity_panel(rows: Sequence[tuple[str, float, float]]) -> Panel:
    """Return the proxies' utilities against those of really trained models.

    References that have names of their own are coloured and labelled. Those that fill the space are
    small dots: labels of dozens would hide what the order of the dots shows.

    Args:
        rows: name, utility of the proxy, utility of the reference model.
    """
    figure, axes = new_axes(3.9, 3.7)
    proxy, real = np.array([row[1] for row in rows]), np.array([row[2] for row in rows])
    diagonal(axes, proxy, real)
    tips: dict[str, str] = {}
    for place, (name, x, y) in enumerate(rows):
        mark = f"reference-{place}"
        tips[mark] = f"{name}: proxy {x:.4f}, really trained {y:.4f}"
        colour = MUTED if is_filling(name) else COLOURS.get(name, PURPLE)
        size, above = (14, 3) if is_filling(name) else (44, 4)
        axes.scatter(x, y, s=size, color=colour, linewidths=0, zorder=above, gid=mark)
    axes.margins(0.12)
    axes.set_xlabel("utility of the proxy, measured")
    axes.set_ylabel("utility, really trained")
    axes.locator_params(nbins=5)
    named = [row for row in rows if not is_filling(row[0])]
    _label(figure, axes, named, np.column_stack([proxy, real]))
    told = "; ".join(f"{name} {x:.4f} and {y:.4f}" for name, x, y in named)
    alt = (
        f"Utility of each proxy and of the model really trained on its mixture, {len(rows)} "
        f"references. Rank correlation {spearman(proxy, real):.2f}. {told}"
    ).rstrip()
    return Panel("fidelity", f"{alt}{'.' if told else ''}", figure, tips)


def _label(
    figure: Figure, axes: Axes, named: Sequence[tuple[str, float, float]], spots: Array
) -> None:
    """Write each name beside its mark, where it hides the fewest marks and names."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # pixels are known once it is laid out
    renderer = RendererAgg(*figure.bbox.size, figure.dpi)
    radius = 3 * figure.dpi / 72
    centres = axes.transData.transform(spots)
    taken = [Bbox([spot - radius, spot + radius]) for spot in centres]
    for name, x, y in named:
        best, best_box, least = None, None, np.inf
        for label in _tried(axes, name, x, y):
            box = label.get_window_extent(renderer)
            hidden = sum(_shared(box, other) for other in taken)
            hidden += 10 * (box.width * box.height - _shared(box, axes.bbox))
            if hidden < least:
                if best is not None:
                    best.remove()
                best, best_box, least = label, box, hidden
            else:
                label.remove()
        assert best_box is not None
        taken.append(best_box)


def _tried(axes: Axes, name: str, x: float, y: float) -> Iterator[Annotation]:
    for across, up, ha, va in _PLACES:
        yield axes.annotate(name, (x, y), xytext=(across, up), textcoords="offset points", ha=ha,
                            va=va, fontsize=8.5, zorder=5)  # fmt: skip


def _shared(first: Bbox, second: Bbox) -> float:
    """Return the area that two boxes have in common."""
    from matplotlib.transforms import Bbox

    both = Bbox.intersection(first, second)
    return 0.0 if both is None else float(both.width * both.height)
