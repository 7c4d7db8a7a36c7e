"""``mergemix compare``: two runs side by side, and what of them may be compared at all.

A utility is a number on the scale of its own search: the scale comes from that search's trials.
So two runs share one only where the scores were measured on the same items by the same model
settings, and then both are put on the scale of the first run. Elsewhere the numbers are shown
next to each other and said not to compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from rich.table import Table as RichTable

from megatron_mergemix.config.validation import is_filling
from megatron_mergemix.console import console
from megatron_mergemix.errors import MergeMixError
from megatron_mergemix.evaluate.utility import Scale
from megatron_mergemix.files.publishing import publish_json, publish_text
from megatron_mergemix.report import costs, tables
from megatron_mergemix.report.content import Section, dotted_settings
from megatron_mergemix.report.gather import Model, Run, models, read_run, scored_on
from megatron_mergemix.report.page import Summary, html_page
from megatron_mergemix.report.table import Cell, Table, shown
from megatron_mergemix.validation.rank_fidelity import rank_correlations

MOST_DIFFERENCES = 6
"""Reasons why scores do not compare that are listed."""

LEARNED = "learned"


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side.

    Attributes:
        names: of both runs.
        comparable: whether scores and utilities may be compared.
        remarks: why not, and what else a reader must know, one sentence each.
        tables: the numbers.
    """

    names: tuple[str, str]
    comparable: bool
    remarks: Sequence[str]
    tables: Sequence[Table]


def compare(
    first: Path, second: Path, *, json_file: Path | None = None, html_file: Path | None = None
) -> None:
    """Print two runs side by side.

    Args:
        first: run directory, or the YAML file that names it.
        second: the same.
        json_file: where the same goes as JSON.
        html_file: where the same goes as a page.

    Raises:
        MergeMixError: one of them has no search.
    """
    runs = read_run(first), read_run(second)
    roots = [run.run_dir.root.resolve() for run in runs]
    if roots[0] == roots[1]:
        raise MergeMixError(f"{first} is compared with itself; name two runs.")
    found = comparison(*runs)
    _print(found)
    if json_file is not None:
        publish_json(json_file, asdict(found))
    if html_file is not None:
        title = f"mergemix: {found.names[0]} and {found.names[1]}"
        lead = "Two runs side by side."
        sections = [Section("tables", "Side by side", tables=found.tables)]
        page = html_page(Summary(title, lead, (), found.remarks, ()), sections)
        publish_text(html_file, page)
        print(f"page: {html_file}")


def comparison(first: Run, second: Run) -> Comparison:
    """Return what two runs have in common and where they differ."""
    names = _names(first, second)
    differing = _differing(first, second)
    comparable = not differing and first.scale is not None
    remarks = [_what_compares(differing, comparable), *_unfinished(names, first, second)]
    runs = (first, second)
    found = [
        _settings(names, first, second),
        _mixtures(names, first, second),
        _utilities(names, first, second, comparable),
        _capabilities(names, runs, comparable),
        _surrogates(names, runs, comparable),
        _pairs("blend", "Epochs of the learned blend", names, *map(_epochs, runs)),
        _pairs("costs", "Cost", names, *map(_costs, runs)),
        _fidelities(names, first, second, comparable),
    ]
    return Comparison(names, comparable, remarks, [each for each in found if each is not None])


def _names(first: Run, second: Run) -> tuple[str, str]:
    one, other = first.run_dir.root, second.run_dir.root
    return (one.name, other.name) if one.name != other.name else (str(one), str(other))


def _differing(first: Run, second: Run) -> list[str]:
    """Return what the scores of one and the same model depend on and is not the same in both."""
    one, other = scored_on(first.digests), scored_on(second.digests)
    changed = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    utilities = [run.config.evaluate.utility for run in (first, second)]
    return changed + (["evaluate.utility"] if utilities[0] != utilities[1] else [])


def _what_compares(differing: Sequence[str], comparable: bool) -> str:
    if comparable:
        return (
            "Both runs scored the same items, so their scores compare. Utilities of both are on "
            "the scale of the first run."
        )
    if not differing:
        return (
            "Both runs scored the same items, but the first has no utilities yet: there is no "
            "scale that both could be on, and no difference of scores is given."
        )
    listed = ", ".join(differing[:MOST_DIFFERENCES])
    more = len(differing) - MOST_DIFFERENCES
    return (
        f"Scores and utilities of the two runs do not compare: {listed}"
        f"{f' and {more} more' if more > 0 else ''} differ. Utilities are on the scale of their "
        "own run, and no difference of what was scored is given."
    )


def _unfinished(names: tuple[str, str], *runs: Run) -> list[str]:
    pairs = zip(names, runs, strict=True)
    return [f"{name}: {text}" for name, run in pairs for text in run.missing]


# ---- the tables ----


def _pairs(
    key: str,
    caption: str,
    names: tuple[str, str],
    *sides: Mapping[str, Cell],
    comparable: bool = True,
) -> Table | None:
    """Return a table of two mappings by the names that either of them has; None of nothing."""
    first, second = sides
    rows: list[list[Cell]] = []
    for name in {**first, **second}:
        one, other = first.get(name), second.get(name)
        rows.append([name, one, other, _minus(other, one) if comparable else None])
    return Table(key, caption, ["what", *names, "difference"], rows) if rows else None


def _minus(second: Cell, first: Cell) -> Cell:
    if isinstance(first, str) or isinstance(second, str) or first is None or second is None:
        return None
    return second - first


def _settings(names: tuple[str, str], first: Run, second: Run) -> Table | None:
    dumps = [run.config.model_dump(mode="json", exclude={"run_dir"}) for run in (first, second)]
    one, other = map(dotted_settings, dumps)
    changed = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    rows = [[name, one.get(name, "(absent)"), other.get(name, "(absent)")] for name in changed]
    return Table("settings", "Settings that differ", ["setting", *names], rows) if rows else None


def _mixtures(names: tuple[str, str], first: Run, second: Run) -> Table | None:
    shares = [{} if run.result is None else run.result["mixture"] for run in (first, second)]
    return _pairs("mixtures", "Learned mixture", names, *shares)


def _utilities(names: tuple[str, str], first: Run, second: Run, comparable: bool) -> Table | None:
    """Return measured utilities by model; where they compare, with paired differences."""
    by_name = [{model.name: model for model in models(run)} for run in (first, second)]
    rows: list[list[Cell]] = []
    for name in {**by_name[0], **by_name[1]}:
        one, other = by_name[0].get(name), by_name[1].get(name)
        scale = first.scale if comparable else second.scale
        row: list[Cell] = [
            name,
            *_utility(first, one, first.scale),
            *_utility(second, other, scale),
        ]
        rows.append([*row, *(_gain(first, one, other) if comparable else (None, None))])
    columns = ["model", names[0], "error", names[1], "error", "difference", "error"]
    return Table("utilities", "Measured utility", columns, rows) if rows else None


def _utility(run: Run, model: Model | None, scale: Scale | None) -> tuple[Cell, Cell]:
    if model is None or scale is None:
        return None, None
    found = run.utility.of_trial(model.scores, scale)
    return found.value, found.stderr


def _gain(first: Run, model: Model | None, other: Model | None) -> tuple[Cell, Cell]:
    """Return by how much the second model is better, with its paired error."""
    if model is None or other is None or first.scale is None:
        return None, None
    gain = first.utility.gain(other.scores, model.scores, first.scale)
    return gain.value, gain.stderr


def _capabilities(names: tuple[str, str], runs: Sequence[Run], comparable: bool) -> Table | None:
    """Return the scores of the learned mixtures by capability and metric."""
    first, second = map(_learned_scores, runs)
    rows: list[list[Cell]] = []
    for name in {**first, **second}:
        one, other = first.get(name, (None, None)), second.get(name, (None, None))
        rows.append([name, *one, *other, _minus(other[0], one[0]) if comparable else None])
    columns = ["score", names[0], "error", names[1], "error", "difference"]
    return Table("capabilities", "Scores of the learned mixture", columns, rows) if rows else None


def _learned_scores(run: Run) -> dict[str, tuple[Cell, Cell]]:
    found: dict[str, tuple[Cell, Cell]] = {}
    for model in models(run):
        if model.name == LEARNED:
            for name, metrics in run.utility.objective.items():
                for metric in metrics:
                    score = model.scores[name][metric]
                    found[f"{name} {metric} ({score.unit})"] = (score.value, score.stderr)
    return found


def _surrogates(names: tuple[str, str], runs: Sequence[Run], comparable: bool) -> Table | None:
    sides = map(_left_out, runs)
    return _pairs("surrogates", "Surrogates, left out", names, *sides, comparable=comparable)


def _left_out(run: Run) -> dict[str, Cell]:
    evidence = {} if run.result is None else run.result["surrogates"]
    return {
        f"{name}, {text}": found[key]
        for name, found in evidence.items()
        for key, text in (("surrogate", "law"), ("spearman", "Spearman"), ("rmse", "RMSE"))
    }


def _epochs(run: Run) -> dict[str, Cell]:
    table = tables.domains_table(run)
    column = list(table.columns).index(tables.EPOCHS)
    return {str(row[0]): row[column] for row in table.rows}


def _costs(run: Run) -> dict[str, Cell]:
    planned = costs.planned_table(run)
    found: dict[str, Cell] = {}
    if not isinstance(planned, str):
        parts = [row for row in planned.rows if row[-1] == "settings"]
        found |= {f"{row[0]}: FLOP by the settings": row[3] for row in parts}
    found |= {f"{row[0]}: seconds": row[3] for row in costs.measured_table(run).rows}
    return found | {"trials": len(run.trials)}


def _fidelities(names: tuple[str, str], first: Run, second: Run, comparable: bool) -> Table | None:
    """Return proxies against real training, the utilities of both runs as in :func:`_utilities`."""
    scale = first.scale if comparable else second.scale
    sides = _fidelity(first, first.scale), _fidelity(second, scale)
    caption = "Proxies against real training"
    return _pairs("fidelity", caption, names, *sides, comparable=comparable)


def _fidelity(run: Run, scale: Scale | None) -> dict[str, Cell]:
    """Return utilities of the references that have names of their own, and rank correlations.

    Those of predicted utilities are left out: a prediction is on the scale of its own run.
    """
    points = [] if scale is None or run.validation is None else _references_on(run, scale)
    found: dict[str, Cell] = {}
    for name, proxy, real in points:
        if not is_filling(name):
            found |= {f"{name}: proxy": proxy, f"{name}: really trained": real}
    if points:
        ranks = rank_correlations(*np.array([point[1:] for point in points]).T)
        found |= {f"utility of proxies: {name.title()}": rank for name, rank in ranks.items()}
    table = tables.fidelity_table(run)
    for row in [] if table is None else table.rows:
        if row[0] in run.utility.capabilities:
            found |= {f"{row[0]}: Spearman": row[2], f"{row[0]}: Kendall": row[5]}
    return found


def _references_on(run: Run, scale: Scale) -> list[tuple[str, float, float]]:
    """Return name, utility of the proxy and utility really trained, on a scale of any run.

    The record has values alone; what they are of, the trials know.
    """
    like = run.scored[0].scores

    def on_scale(values: Mapping[str, Mapping[str, float]]) -> float:
        scores = {
            name: {
                metric: replace(like[name][metric], value=value, stderr=None, items=())
                for metric, value in metrics.items()
            }
            for name, metrics in values.items()
        }
        return run.utility.of_trial(scores, scale).value

    assert run.validation is not None
    return [
        (row["name"], on_scale(row["proxy"]["scores"]), on_scale(row["scores"]))
        for row in run.validation["references"]
    ]


# ---- the terminal ----


def _print(found: Comparison) -> None:
    terminal = console()
    for remark in found.remarks:
        terminal.print(remark)
    for table in found.tables:
        drawn = RichTable(title=table.caption, title_justify="left")
        for place, column in enumerate(table.columns):
            are_texts = any(isinstance(row[place], str) for row in table.rows)
            drawn.add_column(column, justify="left" if are_texts else "right")
        for row in table.rows:
            drawn.add_row(*(shown(cell) for cell in row))
        terminal.print(drawn)
