"""The page: self-contained, escaped, the same bytes each time, and readable by everyone."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest

from megatron_mergemix.cli import main
from megatron_mergemix.report.content import Section, sections_of
from megatron_mergemix.report.drawing import VARIABLES
from megatron_mergemix.report.gather import Run
from megatron_mergemix.report.page import Summary, html_page
from megatron_mergemix.report.summary import summary_of
from megatron_mergemix.report.table import Table, shown
from tests.support.blocked_imports import run_without


class Parsed(HTMLParser):
    """Collects tags, ids, and the texts of tables' first cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    handle_startendtag = handle_starttag


def test_the_page_names_no_address_but_those_of_xml(page: str) -> None:
    found = set(re.findall(r"""(?:https?:)?//[\w.-]+[^\s"'<)]*""", page))
    assert found <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    for tag, attributes in Parsed(page).tags:
        for name in ("src", "href", "xlink:href"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "data:,")), (tag, target)


def test_the_same_run_gives_the_same_page(run: Run, page: str) -> None:
    assert html_page(summary_of(run), sections_of(run)) == page


def test_every_drawing_has_a_text_and_every_name_is_unique(page: str) -> None:
    tags = Parsed(page).tags
    drawings = [attributes for tag, attributes in tags if tag == "svg"]
    assert (
        len(drawings) == 1 + 3 + 4 + 3 + 1 + 1
    )  # plane, lines, left out, profiles, cosines, blend
    assert all(len(drawing["aria-label"] or "") > 40 for drawing in drawings)
    names = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(names) == len(set(names))
    for _, attributes in tags:
        target = attributes.get("xlink:href") or attributes.get("href") or ""
        assert not target.startswith("#") or target[1:] in names


def test_every_section_is_there_and_linked(page: str) -> None:
    for key in (
        *("mixtures", "surrogates", "capabilities", "held-out", "task-vectors", "blend"),
        *("references", "costs", "trials", "provenance"),
    ):
        assert f'<section id="{key}">' in page
        assert f'href="#{key}"' in page
    assert "mergemix validate mix.yaml" in page  # what is missing, and how to get it


def test_whatever_a_name_holds_is_text() -> None:
    evil = '<script>alert("1")</script>&'
    table = Table("t", evil, [evil, "n"], [[evil, 1.0]])
    sections = [Section("s", evil, [evil], tables=[table], missing=[evil], code=evil)]
    page = html_page(Summary(evil, evil, (), [evil], [evil]), sections)
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;") == 14


def test_numbers_are_short_to_read_and_whole_in_the_data() -> None:
    page = html_page(
        Summary("", "", (), (), ()),
        [Section("s", "", tables=[Table("t", "", ["a", "b", "c"], [["x", 1 / 3, None]])])],
    )
    assert '<td class="number" data-value="0.3333333333333333">0.3333</td>' in page
    assert '<td class="number" data-value="">–</td>' in page
    cells = (2_000_000.0, 12, 1e-9, 1.5e12, -0.25, "text")
    assert [shown(cell) for cell in cells] == [
        *("2,000,000", "12", "1e-09", "1.5e+12", "-0.2500", "text")
    ]


def _luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return sum(w * part for w, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _contrast(first: str, second: str) -> float:
    high, low = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_and_marks_stand_out_in_both_themes() -> None:
    """4.5 for text and 3 for marks: WCAG 2.2, 1.4.3 and 1.4.11."""
    css = files("megatron_mergemix.report").joinpath("page.css").read_text()
    themes = [dict(re.findall(r"(--\w+): (#\w{6})", part)) for part in css.split("@media")[:3]]
    light, dark = themes[0], themes[1]
    assert light == {**light, **{name: colour for colour, name in VARIABLES.items()}}
    for theme in (light, dark):
        for name in ("--ink", "--muted", "--blue"):
            assert _contrast(theme[name], theme["--paper"]) >= 4.5
            assert _contrast(theme[name], theme["--shade"]) >= 4.5
        for name in ("--orange", "--green", "--purple"):
            assert _contrast(theme[name], theme["--paper"]) >= 3


def test_a_page_elsewhere_needs_no_writable_run_directory(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished.parent / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "tensorboard", ignore_errors=True)
    (tmp_path / "run" / "tensorboard").write_text("a file, so no folder can be made here")
    page = tmp_path / "elsewhere.html"
    assert main(["report", str(tmp_path / "run"), "--output", str(page)]) == 0
    assert page.exists()
    assert "tensorboard: nothing is written" in capsys.readouterr().out


def test_without_matplotlib_the_message_names_the_extra(finished: Path) -> None:
    code = "from megatron_mergemix.cli import main\nsys.exit(main(['report', sys.argv[1]]))"
    done = run_without(["matplotlib"], code, str(finished))
    assert done.returncode == 1
    assert "pip install 'megatron-mergemix[report]'" in done.stderr
