#!/usr/bin/env python
"""How near strategies come to a known optimum, on synthetic benchmarks with the noise of real ones.

    OMP_NUM_THREADS=1 python tools/bench_strategies.py [--domains 3 5 7 15]
        [--trials 24 40 64 112] [--seeds 24] [--strategies mergemix ...] [--peers random ...]
        [--jobs 1]

Every seed is a surface (:mod:`megatron_mergemix.synthetic.surfaces`): five capabilities, each with
its own best mixture, scored on 300 items. The regret is by how much the true mean accuracy of the
mixture that a search ends with is below that of the best mixture, in points of accuracy.

Strategies have their default settings but for ``search.trials``, the trials of the table, and
``search.seed``. They verify up to two mixtures more by real merges; so that all searches measure
alike, the others get two measurements more as well. The base, which strategies measure too, tells
nothing of mixtures. ``gradient`` takes as many steps as it can pay for, a backward pass being two
forward passes; the noise of its slopes is an assumption (:meth:`SyntheticSurface.measure`), not a
measured one.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
from bench_strategies_peers import NEEDS, PEERS
from numpy.typing import NDArray

from megatron_mergemix import config
from megatron_mergemix.config import evaluate as config_evaluate
from megatron_mergemix.evaluate.utility import Utility
from megatron_mergemix.mixtures.simplex import to_vector, whole_simplex
from megatron_mergemix.search.make import make_strategy
from megatron_mergemix.synthetic.surfaces import SyntheticSurface
from megatron_mergemix.trials import Trial

Array = NDArray[np.float64]

STRATEGIES = ("mergemix", "iterative", "bayesian", "gradient", "grid", "optuna")
"""Those that choose mixtures of their own; ``fixed`` measures what it is given."""

VERIFICATIONS = 2
NUM_ITEMS = 300

TO_REACH = {(5, 24): 0.14, (7, 24): 0.39, (7, 64): 0.11}
"""Domains and trials -> mean regret of the best searches of others: GP-UCB with the posterior's
optimum at 5 and at 7 and 64, three rounds of LightGBM at 7 and 24."""

BASELINE = "random, best observed"
"""No strategy may be worse than this anywhere, in the mean or on its worst surface."""

PASSES = 3
"""Forward passes that a gradient costs: one, and the backward pass."""


class Case(NamedTuple):
    """One search: who, on how many domains, with how many trials, on which surface."""

    search: str
    domains: int
    trials: int
    seed: int


def main() -> None:
    """Print one table per number of domains and of trials, then what was to be reached."""
    args = _arguments()
    searches = [*args.strategies, *_installed(args.peers)]
    default = config.Search().strategy
    print(f"regret in points of accuracy over {args.seeds} seeds; * the default strategy")
    found: dict[tuple[int, int], dict[str, Array]] = {}
    for domains in args.domains:
        for trials in args.trials:
            rows = found[domains, trials] = {}
            print(f"\nK={domains} B={trials}{'':25s}   mean  stderr   worst", flush=True)
            for search, regrets in _measured(searches, domains, trials, args.seeds, args.jobs):
                rows[search] = regrets
                mark = "*" if search == default else " "
                print(f"{mark} {search:32s} {_numbers(regrets)}", flush=True)
    print()
    for line in verdict(found, default):
        print(line)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domains", type=int, nargs="+", default=[3, 5, 7, 15], metavar="K")
    parser.add_argument("--trials", type=int, nargs="+", default=[24, 40, 64, 112], metavar="B")
    parser.add_argument("--seeds", type=int, default=24, help="surfaces per number of domains")
    parser.add_argument("--strategies", nargs="*", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument(
        "--peers", nargs="*", default=[*PEERS], help="first words of their names; default: all"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    args = parser.parse_args()
    unknown = [word for word in args.peers if not any(name.startswith(word) for name in PEERS)]
    if unknown:
        parser.error(f"no peer begins with {unknown[0]!r}; there are: {'; '.join(PEERS)}")
    if min(args.trials) < max(args.domains) + 4:
        parser.error("--trials: strategies need 4 more than there are domains")
    if args.seeds < 2:
        parser.error("--seeds: a standard error needs at least 2")
    return args


def _installed(words: Sequence[str]) -> Iterator[str]:
    """Return the chosen peers, without those whose package is missing, and say which."""
    for name in PEERS:
        if not any(name.startswith(word) for word in words):
            continue
        needed = next((package for word, package in NEEDS.items() if name.startswith(word)), None)
        if needed and importlib.util.find_spec(needed) is None:
            print(f"left out: {name} (pip install {needed})")
            continue
        yield name


def _measured(
    searches: Sequence[str], domains: int, trials: int, seeds: int, jobs: int
) -> Iterator[tuple[str, Array]]:
    """Return the regrets of every search ``(seeds,)``."""
    with ProcessPoolExecutor(jobs) as pool:
        run = pool.map if jobs > 1 else map
        for search in searches:
            cases = [Case(search, domains, trials, seed) for seed in range(seeds)]
            yield search, np.array(list(run(regret, cases)))


def regret(case: Case) -> float:
    """Return how far the mixture that the search ends with is below the optimum, in points."""
    surface = SyntheticSurface(case.domains, case.seed)
    if case.search in PEERS:
        rng = np.random.default_rng([case.seed, case.domains, case.trials])
        measure = partial(_accuracies, surface=surface, rng=rng)
        mixture = PEERS[case.search](measure, case.domains, case.trials + VERIFICATIONS, rng)
    else:
        mixture = _recommended(case, surface)
    return float(100 * (surface.optimum - surface.utility(mixture)))


def _accuracies(points: Array, surface: SyntheticSurface, rng: np.random.Generator) -> Array:
    return rng.binomial(NUM_ITEMS, surface.accuracies(points)) / NUM_ITEMS


def _recommended(case: Case, surface: SyntheticSurface) -> Array:
    """Return what one of our strategies recommends."""
    shares = np.arange(1.0, case.domains + 1)
    settings = _settings(case)
    strategy = make_strategy(
        settings,
        domains=surface.domains,
        utility=Utility(
            config_evaluate.Utility(normalize="none"),
            {name: ["accuracy"] for name in surface.capabilities},
        ),
        bounds=whole_simplex(case.domains),
        proportional=shares / shares.sum(),
    )
    measured: list[Trial] = []
    while not strategy.done():
        measured += [surface.measure(p, NUM_ITEMS, case.seed) for p in strategy.ask()]
        strategy.tell(measured)
    slopes = sum(trial.gradient is not None for trial in measured)
    cost = len(measured) - slopes + slopes * PASSES * settings.minibatch
    assert cost <= 1 + case.trials + VERIFICATIONS
    return to_vector(strategy.recommend().mixture, surface.domains)


def _settings(case: Case) -> config.Search:
    """Return the defaults of a strategy, with as many trials or steps as there are."""
    settings = config.Search(strategy=case.search, trials=case.trials, seed=case.seed)  # type: ignore[arg-type]
    if case.search != "gradient":
        return settings
    whole = case.domains + 3  # the mixtures that fix the scale of the utility
    steps = int((case.trials - whole) / (PASSES * settings.minibatch))
    return config.Search(strategy="gradient", steps=steps, seed=case.seed)


def _numbers(regrets: Array) -> str:
    stderr = regrets.std(ddof=1) / np.sqrt(len(regrets))
    return f"{regrets.mean():7.2f} {stderr:7.2f} {regrets.max():7.2f}"


def verdict(found: dict[tuple[int, int], dict[str, Array]], default: str) -> Iterator[str]:
    """Return in sentences what was to be reached, and who blew up."""
    for (domains, trials), bar in TO_REACH.items():
        rows = found.get((domains, trials), {})
        if default in rows:
            mean = rows[default].mean()
            word = "reached" if mean <= bar else "MISSED"
            yield f"K={domains} B={trials}: at most {bar:.2f} by {default}: {mean:.3f}, {word}"
    for (domains, trials), rows in found.items():
        table = f"K={domains} B={trials}"
        for name in (name for name in STRATEGIES if name in rows and BASELINE in rows):
            mine, random = rows[name], rows[BASELINE]
            if mine.mean() >= random.mean():
                yield f"{table}: {name} is WORSE than {BASELINE}"
            elif mine.max() > random.max():
                worst = f"{mine.max():.2f} on one surface, {BASELINE} at most {random.max():.2f}"
                yield f"{table}: {name} BLOWS UP: {worst}"
        for name in rows if default in rows else ():
            ahead = rows[default] - rows[name]  # on the same surfaces
            error = ahead.std(ddof=1) / np.sqrt(len(ahead))
            if ahead.mean() > 2 * error:
                yield f"{table}: {name} is ahead of {default} by {ahead.mean():.3f} +- {error:.3f}"
    ours = [name for name in STRATEGIES if all(name in rows for rows in found.values())]
    if len(ours) > 1:
        ranks = {name: [_rank(name, ours, rows) for rows in found.values()] for name in ours}
        order = sorted(ours, key=lambda name: float(np.mean(ranks[name])))
        told = ", ".join(f"{name} {np.mean(ranks[name]):.1f}" for name in order)
        yield f"mean rank among our strategies over {len(found)} tables: {told}"


def _rank(name: str, names: Sequence[str], rows: dict[str, Array]) -> int:
    return 1 + sum(rows[other].mean() < rows[name].mean() for other in names)


if __name__ == "__main__":
    main()
