"""What a report says, section by section: text, drawings and tables, or what is missing and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_mergemix.config.validation import is_filling
from megatron_mergemix.diagnosis.regime import REGIMES
from megatron_mergemix.diagnosis.task_vectors import cosines, norms
from megatron_mergemix.mixtures.simplex import Array
from megatron_mergemix.report import costs, tables
from megatron_mergemix.report.drawing import Panel
from megatron_mergemix.report.fidelity_figure import fidelity_panel
from megatron_mergemix.report.gather import Model, Run, blend_line, models
from megatron_mergemix.report.mixture_figures import NEAR, blend_panel, line_panel, plane_panel
from megatron_mergemix.report.model_figures import (
    cosines_panel,
    left_out_panel,
    profile_panel,
)
from megatron_mergemix.report.surface import Surface, left_out, line, plane, surface_of
from megatron_mergemix.report.table import Cell, Table

MOST_LINES = 12
"""Domains that get a line through the optimum; the largest ones."""

MOST_PROFILES = 24

NOTHING_TRAINED = "No reference model is compared with its proxy: `mergemix validate mix.yaml`."


@dataclass(frozen=True)
class Drawings:
    """Panels that belong together.

    Attributes:
        caption: how to read them.
        panels: small drawings, laid out by the page.
    """

    caption: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Section:
    """One part of the page.

    Attributes:
        key: a word for its anchor.
        title: heading.
        text: sentences before everything else.
        drawings: groups of panels.
        tables: below them.
        missing: what it lacks, and why, one sentence each.
        code: a line to copy.
    """

    key: str
    title: str
    text: Sequence[str] = ()
    drawings: Sequence[Drawings] = ()
    tables: Sequence[Table] = ()
    missing: Sequence[str] = field(default=())
    code: str = ""


def sections_of(run: Run) -> list[Section]:
    """Return everything the page shows below its summary."""
    surface = surface_of(run)
    compared = models(run)
    return [
        _mixtures(run, surface),
        _surrogates(run, surface),
        _capabilities(run, compared),
        _held_out(run),
        _task_vectors(run),
        _blend(run),
        _references(run),
        _costs(run),
        Section("trials", "Trials", tables=[tables.trials_table(run)]),
        _provenance(run),
    ]


def _some(*found: Table | None) -> list[Table]:
    return [table for table in found if table is not None]


# ---- the search ----


def _mixtures(run: Run, surface: Surface | str) -> Section:
    found = _some(tables.candidates_table(run), tables.stages_table(run))
    title = "Mixtures"
    if isinstance(surface, str):
        missing = [f"No surface is drawn: {surface}"]
        return Section("mixtures", title, tables=found, missing=missing)
    text = []
    if run.result is None:
        text = ["There is no recommendation; the optimum drawn here is the best trial so far."]
    drawings = list(_plane(run, surface))
    missing = []
    if not drawings and len(run.domains) > 2:
        missing = ["The bounds leave too little of the three largest domains to draw a plane."]
    order = np.argsort(-surface.optimum, kind="stable")[:MOST_LINES]
    panels = [line_panel(run, surface, line(surface, int(place))) for place in order]
    hidden = len(run.domains) - len(panels)
    more = f" The {len(panels)} largest domains are drawn, {hidden} are not." if hidden else ""
    drawings.append(
        Drawings(
            "One line through the optimum for every domain: its share moves from 0 to 1 and the "
            "others keep the proportions they have at the optimum (dotted). Line: utility that the "
            "surrogates expect after all trials; band: 95 % interval of the true utility, on new "
            "items where the trials kept theirs. Green: shares that are as good as the optimum "
            "within noise. Dots are trials by their share and measured utility: filled ones lie "
            f"near the line (at most {NEAR:g} of the tokens would have to change), hollow ones "
            f"are elsewhere and need not meet the band.{more}",
            panels,
        )
    )
    return Section("mixtures", title, text, drawings, found, missing)


def _plane(run: Run, surface: Surface) -> Iterator[Drawings]:
    found = plane(surface)
    if found is None:
        return
    shown = ", ".join(run.domains[place] for place in found.domains)
    caption = f"The simplex of {shown}."
    if found.rest > 1e-9:
        caption = (
            f"A slice of the simplex through the optimum: {shown}, its three largest domains, "
            f"trade the {1 - found.rest:.2f} that they have together; the others keep their "
            f"{found.rest:.2f}."
        )
    elif len(run.domains) > 3:
        caption = f"A face of the simplex: {shown}; the other domains have no share at the optimum."
    caption += (
        " Colour: utility that the surrogates expect after all trials. Star: the optimum. Dashed: "
        "the edge of the mixtures that are as good within noise, which the optimum beats with a "
        "probability below 0.95. Large dots: trials in their measured colour"
    )
    if len(run.domains) > 3:
        caption += (
            ", near this slice; small dots: trials elsewhere, by their shares among the three"
        )
    caption += "."
    if not found.allowed.all():
        caption += " Blank: mixtures that the bounds forbid."
    yield Drawings(caption, [plane_panel(run, surface, found)])


def _surrogates(run: Run, surface: Surface | str) -> Section:
    found = _some(tables.surrogates_table(run))
    title = "Surrogates"
    if isinstance(surface, str):
        missing = [f"No surrogate could be fitted: {surface}"]
        return Section("surrogates", title, tables=found, missing=missing)
    every = left_out(run, surface)
    panels = [left_out_panel(place, each) for place, each in enumerate(every[: MOST_PROFILES + 1])]
    caption = (
        "Each dot is a trial that the surrogate predicted from all other trials, against what was "
        "measured; on the dashed line both agree. Trials that verified a candidate are left out."
    )
    return Section("surrogates", title, drawings=[Drawings(caption, panels)], tables=found)


def _capabilities(run: Run, compared: Sequence[Model]) -> Section:
    pairs = [(name, m) for name, metrics in run.utility.objective.items() for m in metrics]
    known = [
        (name, metric)
        for name, metric in pairs
        if any(metric in model.scores.get(name, {}) for model in compared)
    ]
    panels = [
        profile_panel(place, name, metric, compared)
        for place, (name, metric) in enumerate(known[:MOST_PROFILES])
    ]
    caption = (
        "Scores on the items of the search, bars of 1.96 standard errors. All models see the same "
        "items, so differences are better known than the bars suggest: the table of candidates has "
        "paired errors. A domain alone is the merge that stands for that domain and nothing else."
    )
    missing = []
    if not any(model.name.startswith("expert ") for model in compared):
        missing.append(
            "The experts themselves are not shown: a search scores them when it ends. "
            "`mergemix evaluate mix.yaml experts` does so as well."
        )
    if len(known) > MOST_PROFILES:
        missing.append(f"{len(known) - MOST_PROFILES} more are in the table alone.")
    drawings = [Drawings(caption, panels)] if panels else []
    table = tables.models_table(run, compared)
    return Section("capabilities", "Capabilities", (), drawings, [table], missing)


def _held_out(run: Run) -> Section:
    table = tables.held_out_table(run)
    text = [
        "The winner among many candidates was chosen on the items that speak for it. These are "
        "items that no candidate was chosen on."
    ]
    if table is None:
        why = "the search did not score any." if run.result else "the search is not over."
        return Section("held-out", "New items", missing=[f"No scores on new items: {why}"])
    return Section("held-out", "New items", text, tables=[table])


# ---- experts, blend, references ----


def cosines_of(run: Run) -> tuple[list[str], Array, Array] | None:
    """Return the experts, the cosines of their task vectors and their norms, where known."""
    if run.diagnosis is not None and run.diagnosis.get("cosines"):
        found = run.diagnosis
        return found["experts"], np.array(found["cosines"]), np.array(found["norms"])
    products = None if run.result is None else run.result.get("task_vector_products")
    if not products:
        return None
    inner = np.array(products)
    return run.config.expert_names, cosines(inner), norms(inner)


def _task_vectors(run: Run) -> Section:
    title = "Task vectors"
    found = cosines_of(run)
    if found is None:
        missing = ["The cosines of task vectors are on record when the search is over."]
        return Section("task-vectors", title, missing=missing)
    experts, alike, sizes = found
    rows: list[list[Cell]] = [
        [name, float(size), *map(float, row)]
        for name, size, row in zip(experts, sizes, alike, strict=True)
    ]
    columns = ["expert", "norm", *(f"cosine with {name}" for name in experts)]
    caption = (
        "Cosines of the task vectors, expert minus base. Near 0 the experts changed different "
        "weights and merge without disturbing each other; near 1 they learned much the same."
    )
    text = []
    if run.diagnosis is not None:
        verdict = run.diagnosis.get("verdict") or {}
        text = [REGIMES[verdict["regime"]], *verdict["reasons"]] if verdict else []
    drawings = [Drawings(caption, [cosines_panel(experts, alike)])]
    table = Table("task-vectors", "Norms and cosines of task vectors", columns, rows)
    found_tables = _some(table, tables.curvature_table(run))
    return Section("task-vectors", title, text, drawings, found_tables)


def _blend(run: Run) -> Section:
    table = tables.domains_table(run)
    if run.result is None:
        missing = ["There is no learned blend before the search is over."]
        return Section("blend", "Blend", tables=[table], missing=missing)
    total = run.config.blend.train_tokens
    caption = (
        "Dot: learned share. Bar: the shares of mixtures that are as good within noise. Diamond: "
        "proportional to tokens. Dotted: equal shares."
    )
    missing = []
    if total is None:
        missing = ["Epochs are not known: blend.train_tokens, the tokens of the big run, is unset."]
    else:
        caption += f" Epochs: passes over a domain in {total:.4g} training tokens."
    code = blend_line(run)
    if not code:
        missing.append(
            "The blend files are not written yet for this search: `mergemix blend mix.yaml`."
        )
    drawings = [Drawings(caption, [blend_panel(table)])]
    return Section("blend", "Blend", (), drawings, [table], missing, code)


def reference_points(run: Run) -> list[tuple[str, float, float]]:
    """Return name, utility of the proxy and utility really trained, of every reference."""
    rows = [] if run.validation is None else run.validation["references"]
    return [(row["name"], row["proxy"]["utility"], row["utility"]) for row in rows]


def _references(run: Run) -> Section:
    title = "Real training"
    found = _some(
        tables.references_table(run), tables.fidelity_table(run), tables.choices_table(run)
    )
    if run.validation is None:
        return Section("references", title, missing=[NOTHING_TRAINED])
    points = reference_points(run)
    if len(points) < 2:
        missing = ["There are fewer than two references, so no ranks are compared."]
        return Section("references", title, tables=found, missing=missing)
    caption = (
        "Utility of the proxy that stands for a mixture, and of the model really trained on it, "
        "both on the scale of the search. The order along both axes is what a search relies on; on "
        "the dashed line the numbers agree as well."
    )
    if any(is_filling(name) for name, _, _ in points):
        caption += " Small dots: mixtures that fill the space; a pointer on a dot is told its name."
    notes = list(run.validation.get("notes") or ())
    return Section("references", title, notes, [Drawings(caption, [fidelity_panel(points)])], found)


# ---- costs and provenance ----


def _costs(run: Run) -> Section:
    planned = costs.planned_table(run)
    measured = costs.measured_table(run)
    if isinstance(planned, str):
        return Section("costs", "Costs", tables=[measured], missing=[planned])
    return Section("costs", "Costs", tables=[planned, measured])


def _provenance(run: Run) -> Section:
    digests = run.digests if run.result is None else run.result["digests"]
    settings = dotted_settings(run.config.model_dump(mode="json", exclude_defaults=True))
    found = [
        Table(
            "settings",
            "Settings that differ from their defaults",
            ["setting", "value"],
            [[name, text] for name, text in settings.items()],
        ),  # fmt: skip
        Table(
            "digests",
            "What the result depends on",
            ["what", "digest"],
            [[name, text] for name, text in digests.items()],
        ),  # fmt: skip
    ]
    return Section("provenance", "Provenance", tables=found)


def dotted_settings(value: object, where: str = "") -> dict[str, str]:
    """Return nested settings as ``a.b.c`` -> text."""
    if isinstance(value, dict) and value:
        found: dict[str, str] = {}
        for name, inner in value.items():
            found |= dotted_settings(inner, f"{where}.{name}" if where else str(name))
        return found
    if isinstance(value, list):
        return {where: ", ".join(map(str, value))}
    return {where: str(value)}
