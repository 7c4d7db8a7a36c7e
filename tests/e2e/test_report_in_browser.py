"""The report in a real browser: nothing is asked of a network, and its tables work."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from megatron_mergemix.cli import main
from megatron_mergemix.report.gather import read_run
from megatron_mergemix.report.table import exact
from megatron_mergemix.report.tables import trials_table
from tests.support.browser import Seen, look
from tests.support.searched import searched

CHECK = """
const table = document.getElementById("table-trials");
const headers = [...table.tHead.rows[0].cells];
const column = headers.findIndex((cell) => cell.textContent.trim() === "utility");
const values = () => [...table.tBodies[0].rows].map((row) => row.cells[column].dataset.value);
const sorts = () => headers.map((cell) => cell.getAttribute("aria-sort"));
const button = headers[column].querySelector("button");
button.focus();
const focused = document.activeElement === button;
button.click();
const ascending = values(), first = sorts();
button.click();
const descending = values(), second = sorts();
headers[0].querySelector("button").click();  // back to the order of the trials
let csv = null, name = null;
// Read at once: what is read behind a promise takes time that the browser's clock does not count.
Blob = function (parts) { csv = parts.join(""); };
URL.createObjectURL = () => "blob:taken";
HTMLAnchorElement.prototype.click = function () { name = this.download; };
document.querySelector('button.csv[data-table="table-trials"]').click();
const pixels = (node) => parseFloat(getComputedStyle(node).fontSize) *
  (node.ownerSVGElement ? node.ownerSVGElement.getBoundingClientRect().width /
                          node.ownerSVGElement.viewBox.baseVal.width : 1);
return {
  column, focused, ascending, descending, first, second, csv, name,
  hidden: [...document.querySelectorAll("button.csv")].filter((each) => each.hidden).length,
  width: window.innerWidth, wide: document.documentElement.scrollWidth,
  drawings: [...document.querySelectorAll("svg")].map((svg) => svg.getBoundingClientRect().width),
  smallest: Math.min(...[...document.querySelectorAll("svg text")].map(pixels)),
};
"""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = searched(tmp_path_factory.mktemp("searched"), ["math", "code", "web"])
    assert main(["report", str(path)]) == 0
    return path


@pytest.fixture(scope="module", params=[1280, 390], ids=["desktop", "phone"])
def seen(
    experiment: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Seen:
    page = experiment.parent / "run" / "report.html"
    return look(page, CHECK, tmp_path_factory.mktemp("browser"), width=request.param)


def test_the_browser_complains_of_nothing_and_asks_for_nothing(seen: Seen) -> None:
    assert seen.complaints == []
    assert seen.requests == []


def test_a_browser_would_have_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        "<html><head></head><body><img src='http://nowhere.invalid/a.png'>"
        "<script>undefined_name()</script></body></html>"
    )
    home = tmp_path / "home"
    home.mkdir()
    waiting = "await new Promise((done) => setTimeout(done, 500)); return innerWidth;"
    noticed = look(page, waiting, home, width=390)
    assert noticed.answer == 390
    assert noticed.requests == ["http://nowhere.invalid/a.png"]
    assert any("undefined_name" in complaint for complaint in noticed.complaints)


def test_a_header_sorts_its_column_both_ways_and_says_so(seen: Seen) -> None:
    answer = seen.answer
    known = [float(value) for value in answer["ascending"] if value]
    assert known == sorted(known)
    assert len(known) > 10
    assert [float(value) for value in answer["descending"] if value] == known[::-1]
    assert answer["first"][answer["column"]] == "ascending"
    assert answer["second"][answer["column"]] == "descending"
    assert {*answer["first"]} == {"ascending", "none"}
    assert answer["focused"] is True  # a keyboard reaches it


def test_a_csv_file_has_every_digit_of_its_table(seen: Seen, experiment: Path) -> None:
    table = trials_table(read_run(experiment))
    rows = list(csv.reader(io.StringIO(seen.answer["csv"])))
    assert rows[0] == list(table.columns)
    assert rows[1:] == [[exact(cell) for cell in row] for row in table.rows]
    assert seen.answer["name"] == "table-trials.csv"
    assert seen.answer["hidden"] == 0


def test_nothing_is_wider_than_the_screen_and_letters_can_be_read(seen: Seen) -> None:
    answer = seen.answer
    assert answer["wide"] <= answer["width"]
    assert max(answer["drawings"]) <= answer["width"]
    assert answer["smallest"] >= 10


EVERY_TABLE = """
const tables = [...document.querySelectorAll("table[id]")];
let csv = null;
Blob = function (parts) { csv = parts.join(""); };
URL.createObjectURL = () => "blob:taken";
HTMLAnchorElement.prototype.click = function () {};
const found = [];
for (const table of tables) {
  const rows = table.tBodies[0].rows.length, headers = [...table.tHead.rows[0].cells];
  for (const header of headers) header.querySelector("button").click();
  const sorts = headers.map((cell) => cell.getAttribute("aria-sort"));
  document.querySelector(`button.csv[data-table="${table.id}"]`).click();
  const lines = csv.trimEnd().split("\\n").length;
  const still = table.tBodies[0].rows.length;
  found.push({id: table.id, rows, lines, sorted: sorts.at(-1), still});
}
return {found, all: document.querySelectorAll("table").length};
"""


def test_every_table_sorts_by_every_column_and_gives_its_csv(
    experiment: Path, tmp_path: Path
) -> None:
    seen = look(experiment.parent / "run" / "report.html", EVERY_TABLE, tmp_path)
    assert seen.complaints == []
    assert len(seen.answer["found"]) == seen.answer["all"] > 5
    for table in seen.answer["found"]:
        assert table["sorted"] in ("ascending", "descending"), table["id"]
        assert table["rows"] == table["still"], table["id"]
        assert table["lines"] == table["rows"] + 1, table["id"]


ON_PAPER = """
const gone = [...document.querySelectorAll("nav, .csv")];
const width = (table) => table.getBoundingClientRect().width;
return {
  shown: gone.filter((each) => getComputedStyle(each).display !== "none").length,
  gone: gone.length,
  cut: [...document.querySelectorAll(".scroll")].filter(
    (each) => getComputedStyle(each).overflow !== "visible").length,
  widths: [...document.querySelectorAll("table")].map(
    (table) => [table.id, table.classList.contains("wide"), width(table)]),
};
"""

ON_A4 = {False: 688, True: 1047}
"""Pixels between the margins, upright and across."""


@pytest.mark.parametrize("across", [False, True], ids=["upright", "across"])
def test_on_paper_nothing_is_cut_off_and_nothing_is_to_be_clicked(
    experiment: Path, tmp_path: Path, across: bool
) -> None:
    """The rules for print are applied to a screen as wide as the paper."""
    text = (experiment.parent / "run" / "report.html").read_text(encoding="utf-8")
    assert text.count("@media print") == 1
    page = tmp_path / "printed.html"
    page.write_text(text.replace("@media print", "@media all"), encoding="utf-8")
    home = tmp_path / "home"
    home.mkdir()
    answer = look(page, ON_PAPER, home, width=ON_A4[across]).answer
    assert answer["gone"] > 5
    assert answer["shown"] == answer["cut"] == 0
    for name, is_wide, width in answer["widths"]:
        if is_wide == across:
            assert width <= ON_A4[across], name
