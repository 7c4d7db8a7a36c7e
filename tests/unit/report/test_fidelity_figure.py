"""The drawing of proxies against real training is read at a glance, however many there are."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.colors import to_hex
from matplotlib.text import Annotation

from megatron_mergemix.report.content import reference_points
from megatron_mergemix.report.drawing import BLUE, GREEN, MUTED, ORANGE, PURPLE, Panel, svg
from megatron_mergemix.report.fidelity_figure import fidelity_panel
from megatron_mergemix.report.gather import read_run


@pytest.fixture(scope="module")
def rows(measured: Path) -> list[tuple[str, float, float]]:
    found = reference_points(read_run(measured))
    assert len(found) == 27
    return [*found, ("mine", found[0][1], found[0][2])]


def labels(panel: Panel) -> list[Annotation]:
    return [text for text in panel.figure.axes[0].texts if isinstance(text, Annotation)]


def test_only_references_with_names_of_their_own_are_labelled_and_coloured(
    rows: list[tuple[str, float, float]],
) -> None:
    panel = fidelity_panel(rows)
    assert {label.get_text() for label in labels(panel)} == {
        *("learned", "uniform", "proportional", "mine")
    }
    dots = dict(zip([name for name, _, _ in rows], panel.figure.axes[0].collections, strict=True))
    colours = {name: to_hex(dot.get_facecolor()[0]) for name, dot in dots.items()}
    named = {"learned": BLUE, "uniform": ORANGE, "proportional": GREEN, "mine": PURPLE}
    assert colours == {**dict.fromkeys(dots, MUTED), **named}
    assert dots["filling-01"].get_sizes()[0] < dots["mine"].get_sizes()[0] / 2


def test_no_label_lies_on_another_or_outside(rows: list[tuple[str, float, float]]) -> None:
    near = [("learned", 0.5, 0.5), ("uniform", 0.501, 0.501), ("proportional", 0.502, 0.5)]
    for points in (rows, [*near, ("filling-01", 0.3, 0.2)]):
        panel = fidelity_panel(points)
        renderer = RendererAgg(*panel.figure.bbox.size, panel.figure.dpi)
        boxes = [label.get_window_extent(renderer) for label in labels(panel)]
        assert len(boxes) > 2
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        for box in boxes:
            for corner in box.get_points():
                assert panel.figure.bbox.contains(*corner)


def test_the_text_tells_how_many_and_what_the_named_ones_score(
    rows: list[tuple[str, float, float]],
) -> None:
    alt = fidelity_panel(rows).alt
    assert "28 references. Rank correlation 0.9" in alt
    for name, proxy, real in rows:
        assert (f"{name} {proxy:.4f} and {real:.4f}" in alt) == (not name.startswith("filling"))
    assert len(alt) < 350
    nameless = [("filling-01", 0.1, 0.2), ("filling-02", 0.2, 0.3)]
    assert fidelity_panel(nameless).alt.endswith("Rank correlation 1.00.")


def test_a_pointer_on_any_dot_is_told_its_name_as_text(
    rows: list[tuple[str, float, float]],
) -> None:
    text = svg(fidelity_panel([*rows, ("<b>&", 0.4, 0.4)]))
    assert text.count("<title>") == len(rows) + 1
    assert "<title>filling-01: proxy 0." in text
    assert "<title>&lt;b&gt;&amp;: proxy 0.4000, really trained 0.4000</title>" in text
