#!/usr/bin/env python
"""What racing saves and what it costs, on synthetic benchmarks with the noise of real ones.

    python tools/bench_racing.py [--domains 3 5 7] [--trials 40] [--seeds 20] [--first-share 0.25]
        [--in-common 0.5] [--strategy mergemix] [--jobs 1]

Every seed is a surface (:mod:`megatron_mergemix.synthetic.surfaces`): five capabilities, each with
its own best mixture, scored on 300 items that are right or wrong. It is searched twice with the
same settings, on all items and with ``search.first_share``. The regret is by how much the true mean
accuracy of the recommended mixture is below that of the best one, in points of accuracy. Items are
counted over all merged models, base and verified candidates among them.

Items are not equally hard. ``--in-common`` is the part of the noise that all candidates share, see
:mod:`megatron_mergemix.synthetic.items`. With 0 they have nothing in common, which is the hardest
for a search.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mergemix import config
from megatron_mergemix.config import evaluate as config_evaluate
from megatron_mergemix.evaluate.utility import Utility
from megatron_mergemix.mixtures.simplex import to_vector, whole_simplex
from megatron_mergemix.search.make import make_strategy
from megatron_mergemix.synthetic.items import Items
from megatron_mergemix.synthetic.surfaces import SyntheticSurface
from megatron_mergemix.trials import Trial

Array = NDArray[np.float64]


class Case(NamedTuple):
    """One search."""

    strategy: str
    domains: int
    trials: int
    seed: int
    first_share: float
    in_common: float


class Found(NamedTuple):
    """What became of it: regret in points of accuracy, scored items per capability, models."""

    regret: float
    items: int
    models: int


def main() -> None:
    """Print one row per number of domains and kind of noise."""
    args = _arguments()
    print(
        f"{args.strategy}, {args.trials} trials, first_share {args.first_share:g}, {args.seeds} "
        "searches each; regrets in points of accuracy"
    )
    print("domains  in common   all items       raced   difference           items saved  merges")
    for domains in args.domains:
        for in_common in args.in_common:
            case = Case(args.strategy, domains, args.trials, 0, 1.0, in_common)
            whole, raced = _both(case, args.first_share, args.seeds, args.jobs)
            print(f"{domains:7d} {in_common:10g} {_row(whole, raced)}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domains", type=int, nargs="+", default=[3, 5, 7])
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=20, help="searches per row")
    parser.add_argument("--first-share", type=float, default=0.25)
    parser.add_argument("--in-common", type=float, nargs="+", default=[0.5])
    parser.add_argument("--strategy", default="mergemix")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error("--seeds: a standard error needs at least 2")
    return args


def _both(case: Case, share: float, seeds: int, jobs: int) -> tuple[list[Found], list[Found]]:
    cases = [case._replace(seed=seed) for seed in range(seeds)]
    cases += [each._replace(first_share=share) for each in cases]
    with ProcessPoolExecutor(jobs) as pool:
        found = list((pool.map if jobs > 1 else map)(searched, cases))
    return found[:seeds], found[seeds:]


def _row(whole: list[Found], raced: list[Found]) -> str:
    regrets = np.array(
        [[one.regret, other.regret] for one, other in zip(whole, raced, strict=True)]
    )
    more = regrets[:, 1] - regrets[:, 0]
    error = more.std(ddof=1) / np.sqrt(len(more))
    saved = 1 - sum(each.items for each in raced) / sum(each.items for each in whole)
    merges = sum(each.models for each in raced) / sum(each.models for each in whole)
    return (
        f"{regrets[:, 0].mean():11.3f} {regrets[:, 1].mean():11.3f} {more.mean():+8.3f} +- "
        f"{error:.3f} {100 * saved:18.0f} % {merges:6.2f}x"
    )


def searched(case: Case) -> Found:
    """Search once."""
    surface = SyntheticSurface(case.domains, case.seed)
    shares = np.arange(1.0, case.domains + 1)
    strategy = make_strategy(
        config.Search(
            strategy=case.strategy,  # type: ignore[arg-type]
            trials=case.trials,
            seed=case.seed,
            first_share=case.first_share,
        ),
        domains=surface.domains,
        utility=Utility(
            config_evaluate.Utility(normalize="none"),
            {name: ["accuracy"] for name in surface.capabilities},
        ),
        bounds=whole_simplex(case.domains),
        proportional=shares / shares.sum(),
    )
    items = Items(surface, case.seed, case.in_common)
    trials: list[Trial] = []
    while not strategy.done():
        trials += [items.measure(proposal) for proposal in strategy.ask()]
        strategy.tell(trials)
    mixture = to_vector(strategy.recommend().mixture, surface.domains)
    regret = float(100 * (surface.optimum - surface.utility(mixture)))
    return Found(regret, items.scored, len(trials))


if __name__ == "__main__":
    main()
