"""Compare searches level by level with one over all domains, at the same number of trials.

    python tools/bench_hierarchy.py --groups 4,3,3,5 --trials 40 --group-trials 24

Surfaces with a known optimum (``megatron_mergemix/synthetic/surfaces.py``), several capabilities
that pull in different directions, no structure that would favour groups, and binomial noise.
Printed is the regret of what is recommended, in points of the mean accuracy, over all seeds;
``composed`` and ``coarse`` are what the stages alone, without the joint fit, would recommend.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_mergemix import config
from megatron_mergemix.config import evaluate as config_evaluate
from megatron_mergemix.evaluate.utility import Utility
from megatron_mergemix.mixtures.levels import Levels
from megatron_mergemix.mixtures.simplex import to_vector, whole_simplex
from megatron_mergemix.search.hierarchical import Hierarchical
from megatron_mergemix.search.make import make_strategy
from megatron_mergemix.search.strategy import Recommendation, Strategy
from megatron_mergemix.synthetic.surfaces import SyntheticSurface
from megatron_mergemix.trials import Trial


def main() -> None:
    """Print one row per way to search and number of items."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--groups", default="4,3,3,5", help="domains in each group")
    parser.add_argument("--trials", type=int, default=40, help="of the shares of groups")
    parser.add_argument("--group-trials", type=int, default=24, help="inside each group")
    parser.add_argument("--items", default="300,3000", help="questions per capability: the noise")
    parser.add_argument("--seeds", type=int, default=4)
    options = parser.parse_args()
    sizes = [int(size) for size in options.groups.split(",")]
    print(f"{'items':>6}  {'search':22} {'mean':>7} {'worst':>7}   regret in points")
    for items in map(int, options.items.split(",")):
        regrets = defaultdict(list)
        for seed in range(options.seeds):
            surface = SyntheticSurface(sum(sizes), seed)
            best = surface.optimum
            even = np.full(sum(sizes), 1 / sum(sizes))
            regrets["uniform mixture"].append(best - surface.utility(even))
            for name, mixture in _found(surface, sizes, options, items, seed).items():
                vector = to_vector(mixture, surface.domains)
                regrets[name].append(best - surface.utility(vector))
        for name, values in regrets.items():
            points = 100 * np.array(values)
            print(f"{items:6}  {name:22} {points.mean():7.3f} {points.max():7.3f}", flush=True)


def _found(
    surface: SyntheticSurface, sizes: list[int], options: argparse.Namespace, items: int, seed: int
) -> dict[str, dict[str, float]]:
    """Return way to search -> recommended mixture."""
    utility = Utility(
        config_evaluate.Utility(normalize="none"),
        {name: ["accuracy"] for name in surface.capabilities},
    )
    everywhere, tokens = whole_simplex(sum(sizes)), np.random.default_rng(7)
    proportional = tokens.dirichlet(np.full(sum(sizes), 2.0))
    searched = sum(size > 1 for size in sizes)
    flat = make_strategy(
        config.Search(trials=options.trials + options.group_trials * searched),
        domains=surface.domains,
        utility=utility,
        bounds=everywhere,
        proportional=proportional,
    )
    found = {"all at once": dict(_search(surface, flat, items, seed).mixture)}
    levels = Levels(_groups(surface.domains, sizes), surface.domains, everywhere, {})
    for order in ("top_down", "bottom_up"):
        settings = config.Search.model_validate(
            {"hierarchy": order, "trials": options.trials, "group_trials": options.group_trials}
        )
        strategy = Hierarchical(make_strategy, levels, utility, proportional, settings)
        advice = _search(surface, strategy, items, seed)
        found[order] = dict(advice.mixture)
        for name in ("composed", "coarse"):
            found[f"{order}, {name}"] = dict(advice.alternatives[name]["mixture"])
    return found


def _groups(domains: list[str], sizes: list[int]) -> dict[str, tuple[str, ...]]:
    ends = np.cumsum(sizes)
    return {
        f"group{number}": tuple(domains[end - size : end])
        for number, (size, end) in enumerate(zip(sizes, ends, strict=True))
    }


def _search(surface: SyntheticSurface, strategy: Strategy, items: int, seed: int) -> Recommendation:
    trials: list[Trial] = []
    while not strategy.done():
        trials += [surface.measure(proposal, items, seed) for proposal in strategy.ask()]
        strategy.tell(trials)
    return strategy.recommend()


if __name__ == "__main__":
    main()
