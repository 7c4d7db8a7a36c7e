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
from tests.support.validated import validated

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
    return reported(searched(tmp_path_factory.mktemp("searched"), ["math", "code", "web"]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an experiment whose page lacks nothing: stages, 27 references, a diagnosis."""
    search = {"hierarchy": "top_down", "trials": 12, "group_trials": 8, "surrogate": "quadratic"}
    domains = ["math.algebra", "math.geometry", "code", "web"]
    return reported(validated(tmp_path_factory.mktemp("whole"), domains, {"search": search}))


@pytest.fixture(scope="module")
def fifteen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an experiment with 15 domains, and as many references."""
    changes = {"search": {"trials": 45, "surrogate": "gp"}, "validation": {"space_filling": 12}}
    domains = [f"domain{place}" for place in range(15)]
    return reported(validated(tmp_path_factory.mktemp("fifteen"), domains, changes))


def reported(path: Path) -> Path:
    assert main(["report", str(path)]) == 0
    return path


EXPERIMENTS = ("experiment", "whole", "fifteen")


@pytest.fixture(params=EXPERIMENTS)
def page(request: pytest.FixtureRequest) -> Path:
    """Return the page of each of the experiments."""
    path: Path = request.getfixturevalue(request.param)
    return path.parent / "run" / "report.html"


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


def test_columns_of_one_name_are_told_apart_in_a_csv_file(whole: Path, tmp_path: Path) -> None:
    seen = look(whole.parent / "run" / "report.html", EVERY_TABLE, tmp_path)
    found = {table["id"]: next(csv.reader([table["header"]])) for table in seen.answer["found"]}
    assert found["table-fidelity"] == [
        *("of", "references", "Spearman", "Spearman, from", "Spearman, to"),
        *("Kendall", "Kendall, from", "Kendall, to", "mean absolute error"),
    ]
    assert found["table-held-out"][1:3] == [
        "utility, items searched",
        "utility, items searched, error",
    ]


def test_nothing_is_wider_than_the_screen_and_letters_can_be_read(seen: Seen) -> None:
    answer = seen.answer
    assert answer["wide"] <= answer["width"]
    assert max(answer["drawings"]) <= answer["width"]
    assert answer["smallest"] >= 10


WIDTHS = """
const wide = (found) => [...document.querySelectorAll(found)].map(
  (each) => each.getBoundingClientRect().width);
return {
  page: document.documentElement.scrollWidth, screen: window.innerWidth,
  widest: Math.max(...wide("svg"), ...wide(".scroll"), ...wide(".tiles"), ...wide("pre")),
};
"""


@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
@pytest.mark.parametrize("name", EXPERIMENTS[1:])
def test_a_page_of_everything_is_no_wider_than_the_screen(
    name: str, width: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    page = request.getfixturevalue(name).parent / "run" / "report.html"
    seen = look(page, WIDTHS, tmp_path, width=width)
    assert seen.complaints == []
    assert seen.requests == []
    assert seen.answer["page"] <= seen.answer["screen"]
    assert seen.answer["widest"] <= width


def test_the_page_of_everything_lacks_no_table(whole: Path) -> None:
    text = (whole.parent / "run" / "report.html").read_text(encoding="utf-8")
    for key in (
        *("candidates", "stages", "surrogates", "capabilities", "held-out", "task-vectors"),
        *("curvature", "blend", "references", "fidelity", "choices", "costs", "seconds"),
        *("trials", "settings", "digests"),
    ):
        assert f'<table id="table-{key}"' in text


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
  const header = csv.split("\\r\\n")[0];
  found.push({id: table.id, rows, lines, sorted: sorts.at(-1), still, header});
}
return {found, all: document.querySelectorAll("table").length};
"""


def test_every_table_sorts_by_every_column_and_gives_its_csv(page: Path, tmp_path: Path) -> None:
    seen = look(page, EVERY_TABLE, tmp_path)
    assert seen.complaints == []
    assert len(seen.answer["found"]) == seen.answer["all"] > 5
    for table in seen.answer["found"]:
        assert table["sorted"] in ("ascending", "descending"), table["id"]
        assert table["rows"] == table["still"], table["id"]
        assert table["lines"] == table["rows"] + 1, table["id"]
        (header,) = csv.reader([table["header"]])
        assert len({*header}) == len(header), table["id"]


ON_PAPER = """
const texts = (row) => [...row.cells].map((cell) => cell.textContent);
const headers = (table) => texts(table.tHead.rows[0]);
const all = [...document.querySelectorAll("table")];
const before = Object.fromEntries(all.map((table) => [table.id, headers(table)]));
dispatchEvent(new Event("beforeprint"));
const printed = {};
for (const table of all) {
  printed[table.id] = [...table.parentElement.querySelectorAll("table:not([hidden])")].map(
    (part) => ({
      wide: part.classList.contains("wide"), width: part.getBoundingClientRect().width,
      rows: part.tBodies[0].rows.length, headers: headers(part),
      letters: parseFloat(getComputedStyle(part).fontSize),
      cells: [...part.tBodies[0].rows].every((row) => row.cells.length === headers(part).length),
    }));
}
const gone = [...document.querySelectorAll("nav, .csv")];
const shown = gone.filter((each) => getComputedStyle(each).display !== "none").length;
const cut = [...document.querySelectorAll(".scroll")].filter(
  (each) => getComputedStyle(each).overflow !== "visible").length;
const buttons = [...document.querySelectorAll("thead button")].filter(
  (each) => getComputedStyle(each).display !== "contents").length;
dispatchEvent(new Event("afterprint"));
const after = [...document.querySelectorAll("table:not([hidden])")].map((table) => table.id);
return {before, printed, shown, gone: gone.length, cut, after, buttons};
"""

ON_PAPER_OF_ANY_COUNTRY = {False: 688, True: 980}
"""Pixels between the margins: upright as on A4, across as on US Letter, each the narrower one."""


@pytest.mark.parametrize("across", [False, True], ids=["upright", "across"])
def test_on_paper_nothing_is_cut_off_and_nothing_is_to_be_clicked(
    page: Path, tmp_path: Path, across: bool
) -> None:
    """The rules for print are applied to a screen as wide as the paper."""
    text = page.read_text(encoding="utf-8")
    assert text.count("@media print") == 1
    copy = tmp_path / "printed.html"
    copy.write_text(text.replace("@media print", "@media all"), encoding="utf-8")
    home = tmp_path / "home"
    home.mkdir()
    seen = look(copy, ON_PAPER, home, width=ON_PAPER_OF_ANY_COUNTRY[across])
    answer = seen.answer
    assert seen.complaints == []
    assert answer["gone"] > 5
    assert answer["shown"] == answer["cut"] == 0
    assert answer["buttons"] == 0  # later pages repeat the texts of headers, but no buttons
    for key, parts in answer["printed"].items():
        first, *columns = answer["before"][key]
        assert [part["headers"][0] for part in parts] == [first] * len(parts), key
        assert [name for part in parts for name in part["headers"][1:]] == columns, key
        assert len({part["rows"] for part in parts}) == 1, key
        assert all(part["cells"] for part in parts), key
        for part in parts:
            assert part["letters"] >= 8, key  # CSS pixels: 6 points
            assert part["width"] <= ON_PAPER_OF_ANY_COUNTRY[across] or part["wide"] != across, key
    assert answer["after"] == list(answer["before"])


def test_a_table_of_too_many_columns_is_printed_in_parts(fifteen: Path, tmp_path: Path) -> None:
    page = fifteen.parent / "run" / "report.html"
    printed = look(page, ON_PAPER, tmp_path).answer["printed"]
    parts = {key.removeprefix("table-"): len(each) for key, each in printed.items()}
    assert parts["trials"] == 4
    assert parts["references"] == 3
    assert parts["fidelity"] == parts["settings"] == 1
