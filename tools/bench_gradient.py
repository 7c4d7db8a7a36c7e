#!/usr/bin/env python
"""How many forward passes a search strategy needs until its recommendation is the optimum.

    ./examples/quickstart/run.sh
    MERGEMIX_DEVICE=cpu python tools/bench_gradient.py examples/quickstart/mix.yaml --set \\
        "evaluate.utility.weights={code: 4, math: 2, prose: 1, science: 1, code-questions: 0,
         math-questions: 0, prose-questions: 0, science-questions: 0}"

What has no probabilities of tokens must weigh nothing.

Takes the base and the experts that a run has trained, and searches them anew with every strategy
and several budgets, in one process. A forward-pass equivalent is one model scored on all held-out
windows; a backward pass counts as two, and a minibatch by its part of the windows. Base, design
and verifications are counted.

The optimum is that of the surface fitted to everything that all searches scored. It is scored by a
real merge too, and a recommendation counts as the optimum where it is not behind by more than 1.645
standard errors of the difference, paired over the windows (one-sided 95 %). With several seeds,
all of them must be.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from finished_run import Remembering, optimum, resident, score, scored

from megatron_mergemix.config import Config, load_config
from megatron_mergemix.evaluate.digests import objective
from megatron_mergemix.evaluate.utility import Utility
from megatron_mergemix.experiment.strategy import make_strategy, merge_weights_of
from megatron_mergemix.search.calibration import utility_scale
from megatron_mergemix.search.journal import Journal
from megatron_mergemix.search.loop import run_search
from megatron_mergemix.trials import Trial

BUDGETS: dict[str, tuple[int, ...]] = {
    "mergemix": (8, 10, 12, 16, 24, 40),
    "iterative": (10, 12, 16, 24, 40),
    "bayesian": (8, 10, 12, 16, 24, 40),
    "grid": (10, 12, 20, 35),
    "gradient": (1, 2, 4, 8, 16, 24),
}
"""Strategy -> what is tried: ``trials``, for ``gradient`` ``steps``."""

BEHIND = 1.645


class Search(NamedTuple):
    """A finished search.

    Attributes:
        strategy: its name.
        budget: trials or steps.
        seed: of the search.
        trials: all of them.
        forwards: what they cost in forward-pass equivalents.
        mixture: that was recommended.
    """

    strategy: str
    budget: int
    seed: int
    trials: list[Trial]
    forwards: float
    mixture: Mapping[str, float]


def main() -> None:
    """Search, and print one line per strategy and budget."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="mix.yaml of an experiment with trained experts")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--strategies", nargs="+", choices=BUDGETS, default=[*BUDGETS])
    parser.add_argument("--budgets", type=int, nargs="+", help="default: some for each strategy")
    parser.add_argument("--seeds", type=int, default=2, help="searches per strategy and budget")
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    remembering = scored(config, resident(config))
    searches = [
        search(config, remembering, strategy, budget, seed)
        for strategy in args.strategies
        for budget in args.budgets or BUDGETS[strategy]
        for seed in range(args.seeds)
    ]
    report(config, remembering, searches)


def search(
    config: Config, remembering: Remembering, strategy: str, budget: int, seed: int
) -> Search:
    """Return a search from its first trial to its recommendation."""
    key = "steps" if strategy == "gradient" else "trials"
    settings = type(config.search)(**{"strategy": strategy, key: budget, "seed": seed})
    planner = make_strategy(config.model_copy(update={"search": settings}))
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "trials.jsonl", {})
        run_search(planner, journal, remembering, remembering, merge_weights_of(config))
        trials = journal.trials()
    forwards = sum(cost(config, trial) for trial in trials)
    mixture = planner.recommend().mixture
    print(f"{strategy} {budget}, seed {seed}: {forwards:.1f} forward passes", flush=True)
    return Search(strategy, budget, seed, trials, forwards, mixture)


def cost(config: Config, trial: Trial) -> float:
    """Return the forward-pass equivalents of a trial."""
    if trial.gradient is None:
        return 1.0
    windows = sum(task.sequences for task in config.evaluate.losses.values())
    metrics = [next(iter(scores.values())) for scores in trial.gradient.scores.values()]
    return 3.0 * sum(score.num_samples for score in metrics) / windows


def report(config: Config, remembering: Remembering, searches: Sequence[Search]) -> None:
    """Print how far each recommendation is behind the optimum, and who needed the least."""
    domains = list(config.domains)
    utility = Utility(config.evaluate.utility, objective(config))
    scale = utility_scale(utility, searches[0].trials)
    trials = [trial for each in searches for trial in each.trials]
    mixture = optimum(config, trials, utility, scale)
    best = score(config, remembering, mixture)
    shares = ", ".join(f"{name} {mixture[name]:.3f}" for name in domains)
    print(f"\noptimum of the fitted surface: {shares}; U {utility.of_trial(best, scale).value:.4f}")
    print(f"\n{'strategy':10s} {'budget':>6s} {'forwards':>8s} {'behind by':>20s}  reached")
    least: dict[str, float] = {}
    groups: dict[tuple[str, int], list[Search]] = {}
    for each in searches:
        groups.setdefault((each.strategy, each.budget), []).append(each)
    for (strategy, budget), group in groups.items():
        gains = [
            utility.gain(best, score(config, remembering, each.mixture), scale) for each in group
        ]
        reached = [gain.value <= BEHIND * (gain.stderr or 0.0) for gain in gains]
        forwards = float(np.mean([each.forwards for each in group]))
        behind = max(gains, key=lambda gain: gain.value)
        print(
            f"{strategy:10s} {budget:6d} {forwards:8.1f} "
            f"{behind.value:10.4f} +- {behind.stderr or 0.0:6.4f}  "
            f"{sum(reached)} of {len(reached)}"
        )
        if all(reached):
            least[strategy] = min(least.get(strategy, np.inf), forwards)
    print("\nforward passes until every seed reached it:")
    for strategy in dict.fromkeys(each.strategy for each in searches):
        needed = f"{least[strategy]:.1f}" if strategy in least else "not with these budgets"
        print(f"{strategy:10s} {needed}")


if __name__ == "__main__":
    main()
