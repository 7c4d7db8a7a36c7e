"""The sections of the study's page about mixtures that were chosen and then really trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from findings import Row, Tables
from page_tables import Key, grouped, table
from variants import DEFAULT

CHOSEN = {
    "default": "learned by MergeMix, defaults",
    "share-0": "learned by MergeMix, as in the paper",
    "regmix": "RegMix on short runs of as many tokens",
    "regmix-gp": "the same runs, a Gaussian process instead of trees",
    "top-down": "learned by MergeMix, group by group",
}
"""What names of steps and mixtures mean."""


def learned(tables: Tables) -> Iterator[str]:
    """Yield what four domains give, for both sizes of models."""
    yield from trained_mixtures(tables, "same", 4)
    yield from trained_mixtures(tables, "large", 4)


def trained_mixtures(tables: Tables, model: str, domains: int) -> Iterator[str]:
    """Yield the table of one model and number of domains; nothing where it was not run."""
    rows = [r for r in tables["learned"] if r["model"] == model and r["domains"] == domains]
    if not rows:
        return
    seeds = sorted({row["seed"] for row in rows})
    size = "the large model" if model == "large" else f"{domains} domains"
    by_run = grouped(rows, lambda row: (row["mixture"], row["seed"]))
    yield from (f"## What is chosen, really trained: {size}", "", _about_runs(tables, by_run), "")
    body = []
    for name in dict.fromkeys(row["mixture"] for row in rows):
        runs = {
            seed: [row["trained"] for row in by_run[name, seed]]
            for seed in seeds
            if (name, seed) in by_run
        }
        mean = np.mean([np.mean(values) for values in runs.values()])
        cells = [f"{np.mean(runs[seed]):.4f}" if seed in runs else "" for seed in seeds]
        count = str(max(map(len, runs.values())))
        body.append([CHOSEN.get(name, name), f"{mean:.4f}", *cells, count, behind(rows, name)])
    body.sort(key=lambda cells: cells[1])
    columns = ["mixture", "mean", *(f"seed {seed}" for seed in seeds), "orders of data", "behind"]
    yield from table(columns, body)


def behind(rows: Sequence[Row], name: str) -> str:
    """Return by how much a mixture is worse than the learned one, and in how many runs it is.

    Runs of the same seed and order of data are compared; those of one seed share its base. The
    error is the larger of two: of the mean over seeds, and of one over all runs by how much they
    differ within a seed. Three seeds alone may come out close by chance.
    """
    learned, other = (
        {(row["seed"], row["order"]): row["trained"] for row in rows if row["mixture"] == mixture}
        for mixture in (DEFAULT.name, name)
    )
    by_seed: dict[int, list[float]] = {}
    for seed, order in sorted(learned.keys() & other.keys()):
        by_seed.setdefault(seed, []).append(other[seed, order] - learned[seed, order])
    means = [float(np.mean(values)) for values in by_seed.values()]
    if name == DEFAULT.name or len(means) < 2:
        return ""
    errors = [np.std(means, ddof=1) / np.sqrt(len(means))]
    gaps = [gap for values in by_seed.values() for gap in values]
    if len(gaps) > len(means):
        residuals = [gap - np.mean(values) for values in by_seed.values() for gap in values]
        within = np.sum(np.square(residuals)) / (len(gaps) - len(means))
        errors.append(np.sqrt(within / len(gaps)))
    ahead = sum(gap > 0 for gap in gaps)
    return f"{np.mean(means):+.4f} +- {max(errors):.4f}, in {ahead} of {len(gaps)}"


def _about_runs(tables: Tables, by_run: dict[Key, list[Row]]) -> str:
    text = "Mean bits per byte, lower is better."
    spread = _spread_of_runs(tables["learned"])
    if all(len(rows) == 1 for rows in by_run.values()):
        known = f", so that less than {2 * spread:.4f} tells nothing: see above" if spread else ""
        return f"{text} One run of each mixture and seed{known}."
    return (
        f"{text} Where a mixture was trained on several orders of the data, a seed's number is "
        f"their mean; one run of a mixture differs from its others by {spread:.4f} (standard "
        "deviation). The best of the references is one run, picked for its own score. *behind*: "
        "how much worse than what the defaults learned, on runs of the same seed and order; the "
        "standard error of that mean, over seeds or over runs, the larger one; and in how many "
        "runs it was worse."
    )


def _spread_of_runs(rows: Sequence[Row]) -> float | None:
    """Return the standard deviation among runs of one mixture that differ in the order of data."""
    runs = grouped(
        rows, lambda row: tuple(row[key] for key in ("domains", "model", "mixture", "seed"))
    )
    several = [[row["trained"] for row in group] for group in runs.values() if len(group) > 1]
    if not several:
        return None
    return float(np.sqrt(np.mean([np.var(values, ddof=1) for values in several])))
