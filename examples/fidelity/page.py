"""The page of the study: every number on it comes from the tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from findings import Row, Tables, interval
from plots import write_plots
from variants import BASE_TOKENS, DEFAULT, LR, PAPER, TOKENS, by_budget, by_share

from megatron_mergemix.study.rank_fidelity import spearman

Key = tuple[object, ...]

INTRO = """# Is the proxy true?

Written by `examples/fidelity/run.sh`; every number comes from its CSV files. The testbed is a toy:
a byte-level GPT of 0.17 million parameters, trained on a CPU, on the quickstart's domains. Every
seed has a base of its own ({base:g} million tokens, uniform) and {references} reference models,
really trained from it on mixtures that fill the simplex where every domain has a fifth of its
uniform share at least ({tokens:.1f} million tokens each, constant learning rate {lr:g}; the mean of
the three saves in the last third counts, for experts as well). The score is the mean over domains
of held-out bits per byte. Experts have the budget of references unless a
row says otherwise, and see their data in another order.{fewer}

rho is Spearman's rank correlation over the reference mixtures between what merges and what really
trained models score: the mean over seeds, then each seed's, then a 95 % interval by bootstrap over
mixtures. *error* is the mean absolute difference of the two scores once their mean difference is
taken off, in bits per byte. *regret* is what is lost by training the mixture whose merge is best
instead of the best reference.
"""

FEWER = """
The larger model has {fewer} references on every seed; the whole simplex and seven domains have
{fewer} on one seed."""

WITH_FEWER = ("faces", "large")
"""Kinds of references that are fewer."""


def write_page(tables: Tables, page: Path) -> None:
    """Write the page, and its plots into a folder of its name beside it."""
    agreement = tables["agreement"]
    references = max((row["n"] for row in agreement if row["domains"] == 4), default=0)
    fewer = min(
        (r["n"] for r in agreement if r["references"] in WITH_FEWER or r["domains"] == 7),
        default=references,
    )
    lines = [
        INTRO.format(
            references=references,
            base=BASE_TOKENS / 1e6,
            tokens=TOKENS / 1e6,
            lr=LR,
            fewer=FEWER.format(fewer=fewer) if fewer < references else "",
        )
    ]
    for section in SECTIONS:
        lines += section(tables)
    folder = page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for name, alt in write_plots(tables, folder):
        lines += [f"![{alt}]({folder.name}/{name})", ""]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _headline(tables: Tables) -> Iterator[str]:
    rows: list[tuple[str, Row]] = [
        (
            "references trained again, other data order (the ceiling)",
            _what("trained again", "none"),
        ),
        ("the defaults: general share 0.25, affine merges", _what(DEFAULT.name, "affine")),
        ("as in the paper: one pure expert per domain", _what(PAPER.name, "affine")),
    ]
    yield from _agreements(tables, "Headline", rows, least=1)


def _averaging(tables: Tables) -> Iterator[str]:
    rows = [
        (f"{text}: {which}", {**_what(variant, merge), "references": references})
        for variant, merge, text in (
            ("trained again", "none", "references trained again"),
            (DEFAULT.name, "affine", "the defaults"),
        )
        for which, references in (
            ("means of the last third's saves", "same"),
            ("last saves", "last saves"),
        )
    ]
    if any(row["references"] == "last saves" for row in tables["agreement"]):
        yield from _agreements(
            tables,
            "Means of saves against last saves",
            rows,
            "Experts and references end with the mean of the three saves in the last third of "
            "their steps (`experts.average_last`). The same runs without: their last saves alone, "
            "merged and compared with one another. Averaging was chosen on seed 1.",
        )


def _faces(tables: Tables) -> Iterator[str]:
    faces = {"domains": 4, "references": "faces", "merge": "affine"}
    rows = [
        (f"{text}: {where}", {**what, "variant": variant})
        for variant, text in ((DEFAULT.name, "the defaults"), (PAPER.name, "pure experts"))
        for where, what in (
            ("every domain has a share", _what(variant, "affine")),
            ("the whole simplex", faces),
        )
    ]
    if any(row["references"] == "faces" for row in tables["agreement"]):
        yield from _agreements(
            tables,
            "Mixtures that nearly leave a domain out",
            rows,
            "The references of the other sections give every domain a fifth of its uniform share "
            "at least. They were limited to that after a first seed over the whole simplex, its "
            "faces included, had ranked badly; these rows show both.",
        )


def _shares(tables: Tables) -> Iterator[str]:
    rows = [
        (f"{variant.share:g}, {text}", _what(variant.name, merge))
        for variant in sorted(by_share(), key=lambda variant: variant.share)
        for merge, text in (("affine", "affine merges"), ("shares as weights", "shares as weights"))
        if merge == "affine" or variant.share > 0
    ]
    yield from _agreements(
        tables,
        "Share of general data in the experts",
        rows,
        "*Affine merges* solve for the weights that stand for a mixture; *shares as weights* "
        "merges as if every expert had seen its own domain alone.",
    )


def _budget(tables: Tables) -> Iterator[str]:
    rows = [
        (f"learning rate {variant.lr:g}, {variant.tokens / 1e6:g} million tokens", variant.name)
        for variant in sorted(by_budget(), key=lambda variant: (variant.tokens, variant.lr))
    ]
    yield from _agreements(
        tables,
        "Learning rate and tokens of the experts",
        [(text, _what(name, "affine")) for text, name in rows],
        "The references are the same in all rows.",
    )


def _operators(tables: Tables) -> Iterator[str]:
    rows = [
        (text, _what(PAPER.name, merge))
        for merge, text in (("affine", "weighted sum"), ("ties", "TIES"), ("dare", "DARE"))
    ]
    yield from _agreements(tables, "Other ways to merge, pure experts", rows)


def _transfer(tables: Tables) -> Iterator[str]:
    rows = [
        ("merges of the small model", {**_what(DEFAULT.name, "affine"), "references": "large"}),
        ("small models, really trained", {**_what("trained small", "none"), "references": "large"}),
    ]
    yield from _agreements(tables, "Against references of a model five times as large", rows)


def _seven(tables: Tables) -> Iterator[str]:
    rows = [("the defaults", {**_what(DEFAULT.name, "affine"), "domains": 7})]
    yield from _agreements(tables, "Seven domains", rows, least=1)
    yield from _trained_mixtures(tables, "same", 7)


def _trials(tables: Tables) -> Iterator[str]:
    found = _grouped(tables["trials"], lambda row: (row["surrogate"], row["trials"]))
    if not found:
        return
    numbers = sorted({row["trials"] for row in tables["trials"]})
    yield from (
        "## Number of trials, and surrogates",
        "",
        "rho between what a surrogate of the first n trials of a search predicts for the reference "
        "mixtures and what the really trained models score, mean over seeds (default experts).",
        "",
    )
    body = []
    for surrogate in dict.fromkeys(row["surrogate"] for row in tables["trials"]):
        cells = []
        for number in numbers:
            values = [row["spearman"] for row in found.get((surrogate, number), [])]
            known = [value for value in values if value is not None]
            cells.append(f"{np.mean(known):.2f}" if known else "too few")
        body.append([str(surrogate), *cells])
    yield from _table(["surrogate", *(f"n = {number}" for number in numbers)], body)


def _learned(tables: Tables) -> Iterator[str]:
    yield from _trained_mixtures(tables, "same", 4)
    yield from _trained_mixtures(tables, "large", 4)


def _trained_mixtures(tables: Tables, model: str, domains: int) -> Iterator[str]:
    rows = [r for r in tables["learned"] if r["model"] == model and r["domains"] == domains]
    if not rows:
        return
    seeds = sorted({row["seed"] for row in rows})
    size = "the large model" if model == "large" else f"{domains} domains"
    by_run = _grouped(rows, lambda row: (row["mixture"], row["seed"]))
    yield from (f"## What is chosen, really trained: {size}", "", _about_runs(by_run), "")
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
        body.append([CHOSEN.get(name, name), f"{mean:.4f}", *cells, count, _behind(rows, name)])
    body.sort(key=lambda cells: cells[1])
    columns = ["mixture", "mean", *(f"seed {seed}" for seed in seeds), "orders of data", "behind"]
    yield from _table(columns, body)


def _behind(rows: Sequence[Row], name: str) -> str:
    """Return by how much a mixture is worse than the learned one, run by run, and its error."""
    learned, other = (
        {(row["seed"], row["order"]): row["trained"] for row in rows if row["mixture"] == mixture}
        for mixture in (DEFAULT.name, name)
    )
    gaps = [other[run] - learned[run] for run in sorted(learned.keys() & other.keys())]
    if name == DEFAULT.name or len(gaps) < 2:
        return ""
    return f"{np.mean(gaps):+.4f} +- {np.std(gaps, ddof=1) / np.sqrt(len(gaps)):.4f}"


def _about_runs(by_run: dict[Key, list[Row]]) -> str:
    several = [[row["trained"] for row in rows] for rows in by_run.values() if len(rows) > 1]
    text = "Mean bits per byte, lower is better."
    if not several:
        return f"{text} One run each."
    spread = np.sqrt(np.mean([np.var(values, ddof=1) for values in several]))
    return (
        f"{text} Where a mixture was trained on several orders of the data, a seed's number is "
        f"their mean; one run of a mixture differs from its others by {spread:.4f} (standard "
        "deviation). The best of the references is one run, picked for its own score. *behind*: "
        "how much worse than what the defaults learned, over runs of the same seed and order, and "
        "the standard error of that mean."
    )


def _cost(tables: Tables) -> Iterator[str]:
    seconds = [row["seconds"] for row in tables["steps"] if row["seconds"] is not None]
    if not seconds:
        return
    untimed = len(tables["steps"]) - len(seconds)
    yield from (
        "## What the study costs",
        "",
        f"{len(seconds)} steps took {sum(seconds) / 3600:.1f} hours together, one core each, and "
        f"{wall_seconds(tables['steps']) / 3600:.1f} hours from the first to the last, breaks left "
        "out" + (f"; {untimed} more were not timed." if untimed else "."),
        "",
    )


def wall_seconds(steps: Iterable[Row]) -> float:
    """Return for how long at least one step was under way."""
    total, last = 0.0, 0.0
    timed = [row for row in steps if row["seconds"] is not None and row["ended"] is not None]
    for row in sorted(timed, key=lambda row: row["ended"] - row["seconds"]):
        begun = max(last, row["ended"] - row["seconds"])
        total += max(0.0, row["ended"] - begun)
        last = max(last, row["ended"])
    return total


CHOSEN = {
    "default": "learned by MergeMix, defaults",
    "share-0": "learned by MergeMix, as in the paper",
    "regmix": "RegMix on short runs of as many tokens",
    "top-down": "learned by MergeMix, group by group",
}

SECTIONS: tuple[Callable[[Tables], Iterable[str]], ...] = (
    _headline,
    _averaging,
    _faces,
    _shares,
    _budget,
    _trials,
    _operators,
    _transfer,
    _learned,
    _seven,
    _cost,
)


# ---- tables ----


def _what(variant: str, merge: str) -> Row:
    return {"domains": 4, "references": "same", "variant": variant, "merge": merge}


def _agreements(
    tables: Tables,
    title: str,
    wanted: Sequence[tuple[str, Row]],
    note: str = "",
    least: int = 2,
) -> Iterator[str]:
    """Yield a table of those that were measured; nothing where fewer than ``least`` were."""
    body = []
    columns: list[str] = []
    for text, what in wanted:
        rows = [r for r in tables["agreement"] if all(r[key] == v for key, v in what.items())]
        if not rows:
            continue
        names = [key for key in rows[0] if key.startswith("spearman ")]
        domains = [n.removeprefix("spearman ") for n in names if n not in BOUNDS]
        columns = ["", "rho", "by seed", "interval", *domains, "error", "regret"]
        mean = {key: np.mean([r[key] for r in rows]) for key in rows[0] if _is_number(rows[0][key])}
        low, high = interval(_pairs(tables["points"], what), spearman)
        body.append(
            [
                text,
                f"**{mean['spearman']:.2f}**",
                " ".join(f"{row['spearman']:.2f}" for row in rows),
                f"{low:.2f} to {high:.2f}",
                *(f"{mean[f'spearman {domain}']:.2f}" for domain in domains),
                f"{mean['centred error']:.4f}",
                f"{mean['regret top 1']:.4f}",
            ]
        )
    if len(body) >= least:
        yield from (f"## {title}", "", *([note, ""] if note else []))
        yield from _table(columns, body)


BOUNDS = ("spearman low", "spearman high")


def _pairs(points: Sequence[Row], what: Row) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (merges, trained) of every seed, higher is better."""
    rows = [row for row in points if all(row[key] == value for key, value in what.items())]
    return [
        (-np.array([r["proxy"] for r in found]), -np.array([r["trained"] for r in found]))
        for found in _grouped(rows, lambda row: (row["seed"],)).values()
    ]


def _grouped(rows: Sequence[Row], key: Callable[[Row], Key]) -> dict[Key, list[Row]]:
    found: dict[Key, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _table(columns: Sequence[str], body: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    for cells in body:
        yield f"| {' | '.join(cells)} |"
    yield ""
