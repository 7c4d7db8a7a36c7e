"""How figures of a report look: small panels, colours that both themes can swap, inline SVG.

A panel is as wide as a phone and is laid out by the page, so its letters stay readable on any
screen. Colours of ink and marks become CSS variables of the page; those of a colour scale stay.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, ParamSpec

from megatron_mergemix.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, LINE, PAPER = "#1b1f25", "#57606b", "#d3d9e0", "#fffffe"
BLUE, ORANGE, GREEN, PURPLE = "#0b6cb0", "#c2570c", "#0a7f5f", "#a6468a"

VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    PAPER: "--paper",
    BLUE: "--blue",
    ORANGE: "--orange",
    GREEN: "--green",
    PURPLE: "--purple",
}
"""Colours of the light theme, which the page may change; no colour scale has one of them."""

SCALE, SIGNED_SCALE = "viridis", "PuOr"
"""Both can be told apart with any colour vision."""

_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "none",
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Panel:
    """One drawing.

    Attributes:
        key: a word, unique on the page.
        alt: what it shows, for people who do not see it.
        figure: of matplotlib.
        tips: what a pointer on a mark is told, by the mark's ``gid``.
    """

    key: str
    alt: str
    figure: Figure
    tips: Mapping[str, str] = field(default_factory=dict)


def check_installed() -> None:
    """Check that there is something to draw with.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            "mergemix report draws with matplotlib, which is not installed. Install it: "
            "pip install 'megatron-mergemix[report]'"
        ) from None


Arguments = ParamSpec("Arguments")


def styled(draw: Callable[Arguments, Panel]) -> Callable[Arguments, Panel]:
    """Make a function draw in the style of the report, whatever the user's own is."""

    @functools.wraps(draw)
    def drawn(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Panel:
        import matplotlib

        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_STYLE)
            panel = draw(*args, **kwargs)
            panel.figure.draw_without_rendering()  # lays it out, which every format would repeat
            panel.figure.set_layout_engine("none")
            return panel

    return drawn


def new_axes(width: float, height: float, title: str = "") -> tuple[Figure, Axes]:
    """Return an empty figure of so many inches and its axes; to be called when styled."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    if title:
        axes.set_title(title, loc="left")
    return figure, axes


def svg(panel: Panel) -> str:
    """Return the drawing as an ``<svg>`` element: the same bytes for the same data."""
    import matplotlib

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": panel.key}):
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        panel.figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for mark, tip in panel.tips.items():
        text = text.replace(f'<g id="{mark}">', f'<g id="{mark}"><title>{escape(tip)}</title>', 1)
    # Many drawings share the page, so what they name must be theirs alone.
    text = re.sub(r'\bid="', f'id="{panel.key}-', text)
    text = re.sub(r"url\(#", f"url(#{panel.key}-", text)
    text = re.sub(r'href="#', f'href="#{panel.key}-', text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    label = panel.alt.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1).strip()


def png(panel: Panel) -> bytes:
    """Return the drawing as an image on white paper."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        buffer = io.BytesIO()
        panel.figure.savefig(buffer, format="png", dpi=160, facecolor="white", metadata={})
    return buffer.getvalue()
