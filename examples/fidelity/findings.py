"""What the study found, as tables of plain rows; each is a CSV file beside the runs.

Only what is there counts: a part that was not run leaves no rows.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from leavings import Array, diagnosis, mixtures, scores, scores_of_windows, search_trials
from variants import every_variant

from megatron_mergemix.errors import SearchError
from megatron_mergemix.mixtures.simplex import to_vector
from megatron_mergemix.search.calibration import is_verification
from megatron_mergemix.search.surrogates.choose import fit_surrogate
from megatron_mergemix.validation.rank_fidelity import kendall, regret, spearman

Row = dict[str, Any]
Tables = dict[str, list[Row]]

NUM_DRAWS = 4000
NAMED = 2
"""References that every seed has, uniform and proportional: the first ones in all tables."""
TRIALS = (16, 24, 40, 64, 112)
SURROGATES = ("auto", "gp", "gp_root", "quadratic", "loglinear", "lightgbm")
MERGES = {"scores.json": "affine", "scores-plain.json": "shares as weights"}
EVEN, ODD = slice(0, None, 2), slice(1, None, 2)
"""Halves of the held-out windows, so that merges and references are scored on different text."""
VARIANTS = {variant.name for variant in every_variant()}


def write_tables(out: Path, seeds: Sequence[int]) -> Tables:
    """Return all tables, and write them beside what they are made of."""
    names = ("points", "agreement", "trials", "learned", "diagnoses", "steps")
    tables: Tables = {name: [] for name in names}
    for folder in sorted(out.glob("domains-*/seed-*")):
        seed = int(folder.name.removeprefix("seed-"))
        if seed not in seeds or not (folder / "references" / "done.json").exists():
            continue
        where = {"domains": int(folder.parent.name.removeprefix("domains-")), "seed": seed}
        for name, rows in _of_seed(folder):
            tables[name] += [where | row for row in rows]
    write_csvs(tables, out)
    return tables


def write_csvs(tables: Tables, folder: Path) -> None:
    """Write each table that has rows to ``folder/NAME.csv``."""
    for name, rows in tables.items():
        if rows:
            _write_csv(folder / f"{name}.csv", rows)


def _of_seed(folder: Path) -> Iterator[tuple[str, list[Row]]]:
    wanted = mixtures(folder / "references")
    domains = list(next(iter(wanted.values())))
    trained = scores(folder / "references")
    truths = _truths(folder)
    for what, proxies in _proxies(folder):
        step, truth = truths[what["references"]]
        yield "points", list(_points(what, mixtures(folder / step), proxies, truth))
        yield "agreement", [what | _agreement(proxies, truth, domains)]
    yield "trials", list(_by_trials(folder, domains, wanted, trained))
    yield "learned", list(_learned(folder))
    yield "diagnoses", list(_diagnoses(folder))
    yield "steps", list(_steps(folder))


def _truths(folder: Path) -> dict[str, tuple[str, Array]]:
    """Return what proxies stand for, by its name: the step that has the mixtures, and scores."""
    found = {"same": ("references", scores(folder / "references"))}
    found["other windows"] = ("references", scores_of_windows(folder / "references", ODD))
    if _done(again := folder / "references-again"):
        both = (scores(folder / "references") + scores(again)) / 2
        found["mean of two trainings"] = ("references", both)
    for name in ("large", "faces"):
        if _done(step := folder / f"references-{name}"):
            found[name] = (step.name, scores(step))
    if _done(step := folder / "last-saves"):
        found["last saves"] = (step.name, scores(step, "references.json"))
    return found


def _proxies(folder: Path) -> Iterator[tuple[Row, Array]]:
    """Yield what stands for the references: (which, bits per byte ``(references, domains)``)."""
    same = {"references": "same"}
    if _done(again := folder / "references-again"):
        row = {"variant": "trained again", "merge": "none"}
        yield row | same, scores(again)
        yield row | {"references": "other windows"}, scores_of_windows(again, EVEN)
    for variant in sorted(path for path in folder.iterdir() if path.name in VARIANTS):
        for file, merge in MERGES.items():
            if _done(variant) and (variant / file).exists():
                yield {"variant": variant.name, "merge": merge, **same}, scores(variant, file)
    if _done(folder / "operators"):
        for path in sorted((folder / "operators").glob("*.*.json")):
            variant_name, method = path.stem.rsplit(".", 1)
            what = {"variant": variant_name, "merge": method, **same}
            yield what, scores(folder / "operators", path.name)
    if _done(folder / "default"):
        yield from _proxies_of_other_references(folder)


def _proxies_of_other_references(folder: Path) -> Iterator[tuple[Row, Array]]:
    """Yield the defaults' merges, and others, against what is not the usual references."""
    row = {"variant": "default", "merge": "affine"}
    merges = scores(folder / "default")
    yield row | {"references": "other windows"}, scores_of_windows(folder / "default", EVEN)
    if _done(folder / "references-again"):
        yield row | {"references": "mean of two trainings"}, merges
    if _done(last := folder / "last-saves"):
        yield row | {"references": "last saves"}, merges
        of_last = row | {"variant": "default, last saves"}
        yield of_last | {"references": "same"}, scores(last, "default.json")
        yield of_last | {"references": "last saves"}, scores(last, "default.json")
        again = {"variant": "trained again, last saves", "merge": "none"}
        yield again | {"references": "last saves"}, scores(last, "references-again.json")
    if _done(folder / "faces"):
        for path in sorted((folder / "faces").glob("*.json")):
            if path.stem in VARIANTS:
                what = {"variant": path.stem, "merge": "affine", "references": "faces"}
                yield what, scores(folder / "faces", path.name)
    if _done(large := folder / "references-large"):
        first = slice(len(mixtures(large)))  # of the same mixtures
        yield row | {"references": "large"}, merges[first]
        small = {"variant": "trained small", "merge": "none", "references": "large"}
        yield small, scores(folder / "references")[first]


def _points(
    what: Row, wanted: dict[str, dict[str, float]], proxies: Array, trained: Array
) -> Iterator[Row]:
    for (name, mixture), proxy, truth in zip(wanted.items(), proxies, trained, strict=True):
        row = {**what, "mixture": name, "proxy": proxy.mean(), "trained": truth.mean()}
        for domain, mine, real in zip(mixture, proxy, truth, strict=True):
            row |= {f"share {domain}": mixture[domain]}
            row |= {f"proxy {domain}": mine, f"trained {domain}": real}
        yield row


def _agreement(proxies: Array, trained: Array, domains: Sequence[str]) -> Row:
    """Return how proxies agree with trained models; lower bits per byte are better."""
    mine, real = -proxies.mean(axis=1), -trained.mean(axis=1)
    error = mine - real
    row: Row = {"n": len(mine), "spearman": float(spearman(mine, real))}
    row["spearman low"], row["spearman high"] = interval([(mine, real)], spearman)
    row["kendall"] = float(kendall(mine, real))
    row["absolute error"] = float(np.abs(error).mean())
    row["centred error"] = float(np.abs(error - error.mean()).mean())
    row["spread"] = float(real.std())
    row |= {f"regret top {k}": regret(mine, real, k) for k in (1, 3, 5) if k < len(mine)}
    for domain, first, second in zip(domains, proxies.T, trained.T, strict=True):
        row[f"spearman {domain}"] = float(spearman(first, second))
    return row


def interval(
    pairs: Sequence[tuple[Array, Array]], correlation: Callable[[Array, Array], Array]
) -> tuple[float, float]:
    """Return the 95 % bootstrap interval over mixtures of the correlation's mean over pairs.

    Seeds have mixtures of their own, which are drawn apart. The two with names are in all of them,
    and are drawn for all alike: another seed makes their number no larger.

    Args:
        pairs: of every seed, ``(N,)`` each, with the mixtures that have names first.
        correlation: of ``(B, N)`` and ``(B, N)``.
    """
    rng = np.random.default_rng(0)
    named = rng.integers(NAMED, size=(NUM_DRAWS, NAMED))
    drawn = []
    for mine, real in pairs:
        own = rng.integers(NAMED, len(mine), size=(NUM_DRAWS, len(mine) - NAMED))
        places = np.hstack([named, own])
        drawn.append(correlation(mine[places], real[places]))
    low, high = np.nanpercentile(np.mean(drawn, axis=0), [2.5, 97.5])
    return float(low), float(high)


def _by_trials(
    folder: Path, domains: Sequence[str], wanted: dict[str, dict[str, float]], trained: Array
) -> Iterator[Row]:
    """Yield how surrogates of n trials of one search rank the references."""
    if not _done(folder / "more-trials"):
        return
    trials = search_trials(folder / "more-trials")
    trials = [trial for trial in trials if not is_verification(trial)]
    # A design begins with what every search measures; of the rest, any part fills the simplex.
    first, rest = trials[: len(domains) + 2], trials[len(domains) + 2 :]
    trials = first + random.Random(0).sample(rest, len(rest))
    points = np.array([to_vector(trial.mixture, domains) for trial in trials])
    measured = np.array([[trial.scores[d]["bpb"].value for d in domains] for trial in trials])
    asked = np.array([to_vector(mixture, domains) for mixture in wanted.values()])
    real = -trained.mean(axis=1)
    for num in (num for num in TRIALS if num <= len(trials)):
        for surrogate in SURROGATES:
            row: Row = {"trials": num, "surrogate": surrogate, "spearman": None}
            try:
                columns = [
                    fit_surrogate(surrogate, points[:num], column[:num], None)[0].predict(asked)[0]
                    for column in measured.T
                ]
            except SearchError as error:
                yield row | {"refused": str(error)}
                continue
            predicted = -np.mean(columns, axis=0)
            row["spearman"] = float(spearman(predicted, real))
            yield row | {"regret top 1": regret(predicted, real, 1), "refused": ""}


def _learned(folder: Path) -> Iterator[Row]:
    """Yield the mean bits per byte of chosen mixtures, really trained, beside the references."""
    for step, references in (("learned", "references"), ("learned-large", "references-large")):
        if not _done(folder / step):
            continue
        model = {"model": "large" if step == "learned-large" else "same"}
        means = scores(folder / references).mean(axis=1)
        for name, mean in zip(mixtures(folder / references), means, strict=True):
            if name in ("uniform", "proportional"):
                yield {**model, "mixture": name, "order": "first", "trained": float(mean)}
        best = {"mixture": "best of the references", "trained": float(means.min())}
        yield {**model, "order": "first", **best}
        yield from ({**model, "order": "first", **row} for row in _trained(folder / step))
    if _done(folder / "learned-again"):
        for path in sorted((folder / "learned-again").glob("order-*")):
            again = {"model": "same", "order": path.name.removeprefix("order-")}
            yield from ({**again, **row} for row in _trained(path))


def _trained(folder: Path) -> Iterator[Row]:
    for name, row in zip(mixtures(folder), scores(folder), strict=True):
        yield {"mixture": name, "trained": float(row.mean())}


def _diagnoses(folder: Path) -> Iterator[Row]:
    """Yield what was measured of each variant's experts; of all experts and losses, the largest."""
    if not _done(folder / "diagnoses"):
        return
    for variant in every_variant():
        found = diagnosis(folder / "diagnoses" / variant.name)
        losses = found["curvature"].values()
        yield {
            "variant": variant.name,
            "share": variant.share,
            "delta": max(found["delta"]),
            "gap": max(loss["gap"]["spread_ratio"] for loss in losses),
            "missed": max(loss["expansion_error"] for loss in losses),
        }


def _steps(folder: Path) -> Iterator[Row]:
    """Yield the seconds that every finished step took, and when it ended."""
    for record in sorted(folder.glob("*/done.json")):
        done = json.loads(record.read_text())
        yield {"step": record.parent.name, **{key: done.get(key) for key in ("seconds", "ended")}}


def _done(folder: Path) -> bool:
    return (folder / "done.json").exists()


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({key: _rounded(value) for key, value in row.items()} for row in rows)


def _rounded(value: object) -> object:
    return f"{value:.7g}" if isinstance(value, float) else value
