"""The page of the study: every number on it comes from the tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from findings import Row, Tables, write_csvs
from page_chosen import learned, trained_mixtures
from page_tables import about, agreements, grouped, table
from plots import write_plots
from testbed import LEAST_SHARE
from variants import (
    BASE_TOKENS,
    DEFAULT,
    LR,
    PAPER,
    TOKENS,
    Variant,
    by_budget,
    by_share,
    every_variant,
    pure_by_budget,
)

from megatron_mergemix.validation.rank_fidelity import spearman

INTRO = """# Is the proxy true?

Written by `examples/fidelity/run.sh`; every number comes from the tables beside its pictures
([CSV](fidelity/)). The testbed is a toy: a byte-level GPT of 0.17 million parameters, trained on a
CPU, on the quickstart's domains. Every seed has a base of its own ({base:g} million tokens,
uniform) and {references} reference models, really trained from it ({tokens:.1f} million tokens
each, constant learning rate {lr:g}; the mean of the saves in the last third counts, three of them,
for experts as well). Two are trained on the uniform and the proportional mixture, the others on
mixtures that no other seed has: all together fill the simplex where every domain has a fifth of its
uniform share at least, those of later seeds between those of the ones before, and so closer to each
other. The score is the mean over domains of held-out bits per byte. Experts have the budget of
references unless a row says otherwise, and see their data in another order.{fewer}

rho is Spearman's rank correlation over the reference mixtures between what merges and what really
trained models score: the mean over seeds, then each seed's, then a 95 % interval by bootstrap over
the mixtures of every seed (for these seeds and this held-out text: that other bases and other text
might differ is not in it). *error* is
the mean absolute difference of the two scores once their mean difference is taken off, in bits per
byte. *regret* is what is lost by training the mixture whose merge is best instead of the best
reference.
"""

FEWER = """
The larger model has {fewer} references on every seed; the whole simplex and seven domains have
{fewer} on one seed."""

WITH_FEWER = ("faces", "large")
"""Kinds of references that are fewer."""


def write_page(tables: Tables, page: Path) -> None:
    """Write the page, and its plots and tables into a folder of its name beside it."""
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
    write_csvs(tables, folder)
    for name, alt in write_plots(tables, folder):
        lines += [f"![{alt}]({folder.name}/{name})", ""]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _headline(tables: Tables) -> Iterator[str]:
    again, defaults = about("trained again", "none"), about(DEFAULT.name, "affine")
    rows: list[tuple[str, Row]] = [
        ("the defaults: general share 0.25, affine merges", defaults),
        ("as in the paper: one pure expert per domain", about(PAPER.name, "affine")),
        ("references trained again, other data order", again),
        (
            "the defaults, against the mean of both trainings",
            defaults | {"references": "mean of two trainings"},
        ),
        (
            "the defaults, scored on other text than the references",
            defaults | {"references": "other windows"},
        ),
        (
            "trained again, scored on other text than the references",
            again | {"references": "other windows"},
        ),
    ]
    note = (
        "*Trained again* says how well one training of a reference foretells another one: a proxy "
        "without noise would be ahead of that. *Other text*: merges on one half of the held-out "
        "windows, references on the other half."
    )
    yield from agreements(tables, "Headline", rows, note, least=1)


def _averaging(tables: Tables) -> Iterator[str]:
    last = {"references": "last saves"}
    defaults, alone = (
        about(name, "affine") for name in (DEFAULT.name, f"{DEFAULT.name}, last saves")
    )
    again, again_alone = (
        about(name, "none") for name in ("trained again", "trained again, last saves")
    )
    rows = [
        ("averaged experts, averaged references (the defaults)", defaults),
        ("last saves of experts, averaged references", alone),
        ("averaged experts, last saves of references", defaults | last),
        ("last saves of both", alone | last),
        ("references trained again, both averaged", again),
        ("references trained again, last saves of both", again_alone | last),
    ]
    if any(row["references"] == "last saves" for row in tables["agreement"]):
        yield from agreements(
            tables,
            "Means of saves against last saves",
            rows,
            "Experts and references end with the mean of the saves in the last third of their "
            "steps (`experts.average_last`); these rows are of the same runs. Averaging was chosen "
            "on seed 1, for both at once.",
        )


def _faces(tables: Tables) -> Iterator[str]:
    faces = {"domains": 4, "references": "faces", "merge": "affine"}
    rows = [
        (f"{text}: {where}", {**what, "variant": variant})
        for variant, text in ((DEFAULT.name, "the defaults"), (PAPER.name, "pure experts"))
        for where, what in (
            ("every domain has a share", about(variant, "affine")),
            ("the whole simplex", faces),
        )
    ]
    points = [row for row in tables["points"] if row["references"] == "faces"]
    if points:
        yield from agreements(
            tables,
            "Mixtures that nearly leave a domain out",
            rows,
            "The references of the other sections give every domain a fifth of its uniform share "
            "at least. They were limited to that after a first seed over the whole simplex, its "
            "faces included, had ranked badly; these rows show both. " + _optimism(points),
        )


def _optimism(points: Sequence[Row]) -> str:
    """Return how much better the defaults' merges score than trained models, by least share."""
    least = LEAST_SHARE / 4
    gaps: dict[bool, list[float]] = {True: [], False: []}
    for row in points:
        if row["variant"] == DEFAULT.name:
            smallest = min(value for key, value in row.items() if key.startswith("share "))
            gaps[smallest < least].append(row["proxy"] - row["trained"])
    inside, outside = np.mean(gaps[False]), np.mean(gaps[True])
    return (
        "Merges are too optimistic of mixtures with less of a domain: they score "
        f"{outside:+.3f} bits per byte against trained models, and {inside:+.3f} where every "
        "domain has that share."
    )


def _shares(tables: Tables) -> Iterator[str]:
    rows = [
        (f"{variant.share:g}, {text}", about(variant.name, merge))
        for variant in sorted(by_share(), key=lambda variant: variant.share)
        for merge, text in (("affine", "affine merges"), ("shares as weights", "shares as weights"))
        if merge == "affine" or variant.share > 0
    ]
    yield from agreements(
        tables,
        "Share of general data in the experts",
        rows,
        "*Affine merges* solve for the weights that stand for a mixture; *shares as weights* "
        "merges as if every expert had seen its own domain alone.",
    )


def _budget(tables: Tables) -> Iterator[str]:
    variants = sorted(by_budget(), key=lambda variant: (variant.tokens, variant.lr))
    section = list(
        agreements(
            tables,
            "Learning rate and tokens of the experts",
            [(_budget_of(variant), about(variant.name, "affine")) for variant in variants],
            "The references are the same in all rows.",
        )
    )
    yield from section
    if section:
        yield from _grid(tables, variants)
    yield from agreements(
        tables,
        "Pure experts that go less far",
        [(_budget_of(variant), about(variant.name, "affine")) for variant in pure_by_budget()],
        "One pure expert per domain, as in the paper. The references are the same in all rows.",
    )


def _budget_of(variant: Variant) -> str:
    return f"learning rate {variant.lr:g}, {variant.tokens / 1e6:g} million tokens"


def _grid(tables: Tables, variants: Sequence[Variant]) -> Iterator[str]:
    """Yield the mean rank correlation by learning rate and tokens."""
    found = {
        (variant.lr, variant.tokens): [
            row["spearman"]
            for row in tables["agreement"]
            if about(variant.name, "affine").items() <= row.items()
        ]
        for variant in variants
    }
    columns = list(dict.fromkeys(variant.tokens for variant in variants))
    yield "The mean over seeds again, by learning rate (rows) and million tokens (columns):"
    yield ""
    body = []
    for lr in sorted({variant.lr for variant in variants}):
        cells = [found.get((lr, tokens), []) for tokens in columns]
        body.append([f"{lr:g}", *(f"{np.mean(rhos):.2f}" if rhos else "" for rhos in cells)])
    yield from table(["", *(f"{tokens / 1e6:g}" for tokens in columns)], body)


def _operators(tables: Tables) -> Iterator[str]:
    methods = ("shares as weights", "ties", "dare")
    rows = [
        (f"{text}: {merge}", about(variant, merge))
        for variant, text in ((DEFAULT.name, "default experts"), (PAPER.name, "pure experts"))
        for merge in methods
        if (variant, merge) != (PAPER.name, methods[0])
    ]
    rows.insert(len(methods), ("pure experts: shares as weights", about(PAPER.name, "affine")))
    if any(row["merge"] in methods[1:] for row in tables["agreement"]):
        yield from agreements(
            tables,
            "Other ways to merge",
            rows,
            "TIES and DARE with the defaults of `mergemix merge` (density 0.2 and 0.5, scale 1), "
            "and the shares of a mixture as weights: none of them is tuned.",
        )


def _diagnoses(tables: Tables) -> Iterator[str]:
    rho = {
        (row["seed"], row["variant"]): row["spearman"]
        for row in tables["agreement"]
        if all(row[key] == value for key, value in about(row["variant"], "affine").items())
    }
    found = [row | {"rho": rho[row["seed"], row["variant"]]} for row in tables["diagnoses"]]
    if not found:
        return
    sharing = [row for row in found if row["share"] > 0]
    columns = {"delta": "delta", "gap": "gap", "missed": "missed"}
    related = {
        key: spearman(np.array([r[key] for r in sharing]), np.array([r["rho"] for r in sharing]))
        for key in columns
    }
    yield from (
        "## What `mergemix diagnose` measures of the experts",
        "",
        "*delta*: the largest change of an expert relative to the base. *gap*: by how much, in "
        "theory, trained and merged models differ, its spread over that of the loss. *missed*: "
        "what the second order misses of the changes of a loss. Each is that of the worst expert "
        "or loss, its range over seeds. Over variants and seeds with a general share, their rank "
        "correlations with rho are "
        + ", ".join(f"{value:+.2f} ({columns[key]})" for key, value in related.items())
        + ".",
        "",
    )
    body = []
    for variant in every_variant():
        rows = [row for row in found if row["variant"] == variant.name]
        cells = [
            " to ".join(f"{f(r[key] for r in rows):.1%}" for f in (min, max)) for key in columns
        ]
        body.append([_label(variant), np.mean([row["rho"] for row in rows]), *cells])
    body.sort(key=lambda cells: -cells[1])
    body = [[label, f"**{rho:.2f}**", *cells] for label, rho, *cells in body]
    yield from table(["experts", "rho", *columns.values()], body)


def _label(variant: Variant) -> str:
    return f"share {variant.share:g}, {_budget_of(variant)}"


def _transfer(tables: Tables) -> Iterator[str]:
    rows = [
        ("merges of the small model", {**about(DEFAULT.name, "affine"), "references": "large"}),
        ("small models, really trained", {**about("trained small", "none"), "references": "large"}),
    ]
    yield from agreements(tables, "Against references of a model five times as large", rows)


def _seven(tables: Tables) -> Iterator[str]:
    rows = [("the defaults", {**about(DEFAULT.name, "affine"), "domains": 7})]
    yield from agreements(tables, "Seven domains", rows, least=1)
    yield from trained_mixtures(tables, "same", 7)


def _trials(tables: Tables) -> Iterator[str]:
    found = grouped(tables["trials"], lambda row: (row["surrogate"], row["trials"]))
    if not found:
        return
    numbers = sorted({row["trials"] for row in tables["trials"]})
    yield from (
        "## Number of trials, and surrogates",
        "",
        "rho between what a surrogate predicts for the reference mixtures, which learned from n "
        "trials of one long search, and what the really trained models score: mean over seeds "
        "(default experts).",
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
    yield from table(["surrogate", *(f"n = {number}" for number in numbers)], body)


def _cost(tables: Tables) -> Iterator[str]:
    seconds = [row["seconds"] for row in tables["steps"] if row["seconds"] is not None]
    if not seconds:
        return
    yield from (
        "## What the study costs",
        "",
        f"{len(seconds)} steps took {sum(seconds) / 3600:.1f} hours together, one core each.",
        "",
    )


SECTIONS: tuple[Callable[[Tables], Iterable[str]], ...] = (
    _headline,
    _averaging,
    _faces,
    _shares,
    _budget,
    _trials,
    _operators,
    _diagnoses,
    _transfer,
    learned,
    _seven,
    _cost,
)
