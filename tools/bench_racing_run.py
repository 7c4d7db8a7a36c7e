#!/usr/bin/env python
"""What racing saves and what it costs on the real tasks of a run that has trained its experts.

    ./examples/quickstart/run.sh
    MERGEMIX_DEVICE=cpu python tools/bench_racing_run.py examples/quickstart/mix.yaml
        [--seeds 5] [--first-share 0.25]

Each seed searches twice with the settings of the run, on all items and with ``search.first_share``.
Both recommendations are scored on all items; their difference has the standard error of pairs of
items, the mean that of seeds. The optimum is that of the surface fitted to all that a seed's two
searches scored. An item is a window or a question for one merged model; base, design and
verifications are counted.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from finished_run import Remembering, optimum, resident, score, scored

from megatron_mergemix.config import Config, load_config
from megatron_mergemix.evaluate.digests import objective
from megatron_mergemix.evaluate.utility import Measured, Utility
from megatron_mergemix.experiment.strategy import make_strategy, merge_weights_of
from megatron_mergemix.search.calibration import utility_scale
from megatron_mergemix.search.journal import Journal
from megatron_mergemix.search.loop import run_search
from megatron_mergemix.trials import Trial


class Row(NamedTuple):
    """Behind the optimum of the surface, on all items and raced; what that costs, and saves."""

    whole: float
    raced: float
    costs: Measured
    saved: float
    merges: float


class Search(NamedTuple):
    """A finished search: all of its trials, what was recommended, items scored, models merged."""

    trials: list[Trial]
    mixture: Mapping[str, float]
    items: int
    merges: int


def main() -> None:
    """Print one row per seed, then the means."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="mix.yaml of an experiment with trained experts")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, default=5, help="searches of each kind")
    parser.add_argument("--first-share", type=float, default=0.25)
    args = parser.parse_args()
    config = load_config(args.config, [*args.overrides, f"search.first_share={args.first_share}"])
    proxy = resident(config)
    rows = []
    for seed in range(args.seeds):
        search = config.search.model_copy(update={"seed": seed})
        rows.append(compared(config.model_copy(update={"search": search}), proxy))
        print(f"seed {seed}: {_text(rows[-1])}", flush=True)
    stderr = float(np.std([row.costs.value for row in rows], ddof=1)) / np.sqrt(len(rows))
    behind, raced, costs, saved, merges = np.mean([_numbers(row) for row in rows], axis=0).tolist()
    print(f"  mean: {_text(Row(behind, raced, Measured(costs, stderr), saved, merges))}")


def compared(config: Config, proxy: Any) -> Row:
    """Return what racing as configured costs and saves for one seed."""
    remembering = scored(config, proxy)  # its order of items, and so the first of them, is by seed
    whole = search(config, remembering, 1.0)
    raced = search(config, remembering, config.search.first_share)
    utility = Utility(config.evaluate.utility, objective(config))
    scale = utility_scale(utility, whole.trials)
    mixtures = whole.mixture, raced.mixture
    best_mixture = optimum(config, [*whole.trials, *raced.trials], utility, scale)
    best, *found = (score(config, remembering, m) for m in (best_mixture, *mixtures))
    return Row(
        *(utility.gain(best, each, scale).value for each in found),
        utility.gain(found[0], found[1], scale),
        1 - raced.items / whole.items,
        raced.merges / whole.merges,
    )


def search(config: Config, remembering: Remembering, first_share: float) -> Search:
    """Return a search from its first trial to its recommendation."""
    settings = config.search.model_copy(update={"first_share": first_share})
    planner = make_strategy(config.model_copy(update={"search": settings}))
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "trials.jsonl", {})
        run_search(planner, journal, remembering, remembering, merge_weights_of(config))
        trials = journal.trials()
    begun = {tuple(t.mixture.values()): _items(t) for t in trials if t.first is not None}
    items = sum(_items(trial) for trial in trials)
    items -= sum(begun.get(tuple(t.mixture.values()), 0) for t in trials if t.first is None)
    return Search(trials, planner.recommend().mixture, items, len(trials))


def _items(trial: Trial) -> int:
    """Return how many items a trial's scores stand on, those of a first share among them."""
    found = (next(iter(metrics.values())) for metrics in trial.scores.values())
    return sum(metric.num_samples for metric in found)


def _text(row: Row) -> str:
    return (
        f"behind the optimum by {row.whole:.4f}, raced {row.raced:.4f}; racing costs "
        f"{row.costs.value:+.4f} +- {row.costs.stderr or 0.0:.4f}, saves {100 * row.saved:.0f} % "
        f"of the items, merges {row.merges:.2f} times as often"
    )


def _numbers(row: Row) -> list[float]:
    return [row.whole, row.raced, row.costs.value, row.saved, row.merges]


if __name__ == "__main__":
    main()
