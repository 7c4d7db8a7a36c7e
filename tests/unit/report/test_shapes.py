"""Experiments of other shapes have the same page, or say which drawings they lack."""

from __future__ import annotations

from pathlib import Path

from megatron_mergemix.report.content import Section, sections_of
from megatron_mergemix.report.gather import read_run
from megatron_mergemix.report.surface import Surface, explored, surface_of
from tests.support.searched import searched


def sections(path: Path) -> dict[str, Section]:
    return {section.key: section for section in sections_of(read_run(path))}


def keys(section: Section) -> list[str]:
    return [panel.key for drawings in section.drawings for panel in drawings.panels]


def test_two_domains_have_lines_and_no_plane(tmp_path: Path) -> None:
    found = sections(searched(tmp_path, ["math", "code"]))
    assert sorted(keys(found["mixtures"])) == ["line-0", "line-1"]


def test_five_domains_have_a_slice_that_says_what_stays(tmp_path: Path) -> None:
    names = ["a", "b", "c", "d", "e"]
    found = sections(
        searched(tmp_path, names, {"search": {"trials": 23, "surrogate": "quadratic"}})
    )
    assert keys(found["mixtures"])[0] == "plane"
    assert len(keys(found["mixtures"])) == 6
    caption = found["mixtures"].drawings[0].caption
    assert caption.startswith("A slice of the simplex through the optimum")
    assert "the others keep their" in caption


def test_a_hierarchical_search_shows_its_stages(tmp_path: Path) -> None:
    search = {"hierarchy": "top_down", "trials": 6, "group_trials": 6, "surrogate": "quadratic"}
    names = ["math.algebra", "math.geometry", "web"]
    found = sections(searched(tmp_path, names, {"search": search}))
    tables = {table.key: table for table in found["mixtures"].tables}
    assert [row[0] for row in tables["stages"].rows] == ["coarse", "math"]
    assert keys(found["mixtures"])[0] == "plane"


def test_components_have_one_merge_weight_per_expert(tmp_path: Path) -> None:
    components = {
        "mostly-math": {"math": 0.9, "code": 0.1},
        "mostly-code": {"math": 0.1, "code": 0.9},
        "both": {"math": 0.5, "code": 0.5},
    }
    path = searched(tmp_path, ["math", "code"], components=components)
    found = sections(path)
    columns = found["trials"].tables[0].columns
    assert [name for name in columns if name.startswith("alpha")] == [
        f"alpha of {name}" for name in components
    ]
    assert len(found["task-vectors"].tables[0].rows) == 3


def test_a_raced_search_teaches_with_all_trials_and_shows_those_on_all_items(
    tmp_path: Path,
) -> None:
    search = {"first_share": 0.25, "trials": 16, "surrogate": "gp"}
    run = read_run(searched(tmp_path, ["math", "code", "web"], {"search": search}))
    surface = surface_of(run)
    assert isinstance(surface, Surface), surface
    on_a_share = [trial for trial in run.trials if trial.first is not None]
    raced = [trial for trial in run.trials if trial.purpose.startswith("race:")]
    assert len(on_a_share) > len(raced) > 0
    assert len(surface.points) == len(run.trials) - 1 - len(on_a_share)  # and without the base
    assert len(explored(run)) == 16
    keys_of_sections = [section.key for section in sections_of(run)]
    assert "mixtures" in keys_of_sections
