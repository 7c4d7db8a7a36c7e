#!/usr/bin/env python
"""How well surrogates rank mixtures they have not seen, on real runs: Spearman's correlation.

    python tools/bench_surrogates.py --data regmix/data [--rows 32 64 128] [--draws 6] [--quick]

The folder holds the runs of RegMix (github.com/sail-sg/regmix) or others in its format:
``train_mixture*.csv`` and ``train*loss*.csv``, the same for ``test``; a line is a run, its columns
an index and the shares of domains, or the losses of targets. Every method is fitted to a random
part of the training runs and predicts all test runs; the draws are the same for all methods.

``as published`` are the settings of RegMix (LightGBM, 1000 trees, its default leaf of 20 rows; no
early stopping, which RegMix does on the test runs) and of DeMix's smallest budget (ridge 0.5).
"""

from __future__ import annotations

import argparse
import csv
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mergemix.errors import SearchError
from megatron_mergemix.search.surrogates import SURROGATES
from megatron_mergemix.search.surrogates.choose import fit_surrogate, spearman

Array = NDArray[np.float64]

TO_REACH = {32: (0.82, 0.96), 64: (0.90, None), 128: (0.93, None)}
"""Rows -> the mean over all targets, and the highlighted one, of the 13 losses of RegMix: the best
published kinds of regression, refitted."""


class Runs(NamedTuple):
    """Measured runs: mixtures ``(N, D)`` and losses ``(N, T)``."""

    mixtures: Array
    losses: Array


Predictor = Callable[[Array, Array, Array], Array]
"""Fits mixtures and scores, higher is better, and predicts other mixtures."""


def main() -> None:
    """Print a table, one line per number of rows and method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the csv files")
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--draws", type=int, default=6, help="random parts of the training runs")
    parser.add_argument("--targets", nargs="+", help="parts of their names; default: all")
    parser.add_argument("--highlight", default="pile_cc", help="part of a target's name")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS], default=[*METHODS])
    parser.add_argument("--quick", action="store_true", help="one draw, at the least rows")
    args = parser.parse_args()
    names, train, test = read_runs(args.data)
    wanted = [n for n in names if not args.targets or any(t in n for t in args.targets)]
    if not wanted:
        parser.error(f"no target is called like {args.targets}; there are {', '.join(names)}")
    if args.quick:
        args.rows, args.draws = args.rows[:1], 1
    print(
        f"{len(train.mixtures)} training and {len(test.mixtures)} test runs, "
        f"{train.mixtures.shape[1]} domains, {len(wanted)} targets, {args.draws} draws"
    )
    columns = [names.index(name) for name in wanted]
    special = [i for i, name in enumerate(wanted) if args.highlight in name]
    for num_rows in args.rows:
        mean, highlight = TO_REACH.get(num_rows, (None, None))
        print(f"\n{num_rows} rows{'':23s} {'mean':>6s} {'worst':>6s} {args.highlight:>8s}  s/fit")
        print(f"{'  to reach':31s} {text(mean)} {text(None)} {text(highlight, 8)}")
        for method in args.methods:
            started, chosen = time.perf_counter(), Counter[str]()
            try:
                ranks = correlations(METHODS[method](chosen), train, test, columns, num_rows, args)
            except SearchError as error:
                print(f"  {method:29s} refused: {str(error).split(';')[0]}")
                continue
            seconds = (time.perf_counter() - started) / ranks.size
            by_target = ranks.mean(axis=0)
            one = float(by_target[special].mean()) if special else None
            print(
                f"  {method:29s} {text(ranks.mean())} {text(by_target.min())} {text(one, 8)}  "
                f"{seconds:.2f}"
                + (f"  {', '.join(f'{k} {v}' for k, v in chosen.most_common())}" if chosen else ""),
                flush=True,
            )


def correlations(
    predictor: Predictor,
    train: Runs,
    test: Runs,
    columns: Sequence[int],
    num_rows: int,
    args: argparse.Namespace,
) -> Array:
    """Return Spearman's correlation on the test runs, ``(draws, targets)``."""
    found = np.empty((args.draws, len(columns)))
    for draw in range(args.draws):
        rng = np.random.default_rng([draw, num_rows])
        rows = rng.choice(len(train.mixtures), num_rows, replace=False)
        for place, column in enumerate(columns):
            scores = -train.losses[rows, column]
            predicted = predictor(train.mixtures[rows], scores, test.mixtures)
            found[draw, place] = spearman(predicted, -test.losses[:, column])
    return found


def text(value: float | None, width: int = 6) -> str:
    """Return the number in so many columns, or a dash."""
    return f"{'-':>{width}s}" if value is None else f"{value:{width}.3f}"


# ---- methods ----


def ours(name: str) -> Callable[[Counter[str]], Predictor]:
    """Return a surrogate of the search, or ``auto``, which counts what it took."""

    def make(chosen: Counter[str]) -> Predictor:
        def predict(points: Array, scores: Array, others: Array) -> Array:
            surrogate, evidence = fit_surrogate(name, points, scores, None)
            if name == "auto":
                chosen[str(evidence["surrogate"])] += 1
            return surrogate.predict(others)[0]

        return predict

    return make


def regmix(_: Counter[str]) -> Predictor:
    """Return LightGBM with the settings in RegMix's notebook."""
    import lightgbm

    def predict(points: Array, scores: Array, others: Array) -> Array:
        settings = {"objective": "regression", "learning_rate": 0.01, "num_threads": 1}
        settings |= {"seed": 42, "verbose": -1, "deterministic": True, "force_row_wise": True}
        model = lightgbm.train(settings, lightgbm.Dataset(points, scores), 1000)
        return np.asarray(model.predict(others))

    return predict


def ridge(_: Counter[str]) -> Predictor:
    """Return the ridge regression of DeMix's smallest budget."""
    from sklearn.linear_model import Ridge

    return lambda points, scores, others: np.asarray(Ridge(0.5).fit(points, scores).predict(others))


METHODS = {
    "auto": ours("auto"),
    **{name: ours(name) for name in SURROGATES},
    "LightGBM as published": regmix,
    "ridge as published": ridge,
}


# ---- data ----


def read_runs(folder: Path) -> tuple[list[str], Runs, Runs]:
    """Return the names of the targets, the training runs and the test runs."""
    parts = []
    for part in ("train", "test"):
        domains, indices, mixtures = read_table(folder, f"{part}_mixture*.csv")
        targets, same, losses = read_table(folder, f"{part}*loss*.csv")
        if indices != same:
            raise SystemExit(f"{folder}: the {part} mixtures and losses are not of the same runs.")
        totals = mixtures.sum(axis=1, keepdims=True)
        if np.abs(totals - 1).max() > 0.01:
            raise SystemExit(f"{folder}: the shares of a {part} mixture sum to other than 1.")
        parts.append((domains, targets, Runs(mixtures / totals, losses)))
    (domains, targets, train), (others, again, test) = parts
    if domains != others or targets != again:
        raise SystemExit(f"{folder}: training and test runs have different columns.")
    return targets, train, test


def read_table(folder: Path, pattern: str) -> tuple[list[str], list[str], Array]:
    """Return the names of the columns, the indices of the lines and the numbers of a csv file."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"{folder}: expected one file {pattern}; found {len(found)}.")
    with found[0].open(newline="") as file:
        (_, *names), *lines = csv.reader(file)
    return names, [line[0] for line in lines], np.array([line[1:] for line in lines], np.float64)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="X does not have valid feature names")
    main()
