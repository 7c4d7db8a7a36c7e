"""Is the search as sure as it may be? Intervals and probabilities against known surfaces.

    python tools/bench_uncertainty.py --domains 3,5,7 --trials 24,40 --searches 20 --items own
    python tools/bench_uncertainty.py --items shared

Every search runs on a synthetic surface of its own, so the true utility of every mixture is known.
Printed are how often the 95 % interval holds that of the recommended mixture, on which side it
is missed, and, for statements of equal probability ("better than uniform"), how often they are
true. ``--items own`` draws binomial noise for every trial. ``shared`` scores all trials on the same
items without any other noise, as held-out losses do; true is then the mean over all items.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from megatron_mergemix import config
from megatron_mergemix.config import evaluate as config_evaluate
from megatron_mergemix.evaluate.utility import Utility
from megatron_mergemix.mixtures.simplex import Array, to_vector, uniform, whole_simplex
from megatron_mergemix.search.make import make_strategy
from megatron_mergemix.search.strategy import Proposal
from megatron_mergemix.synthetic.surfaces import SyntheticSurface
from megatron_mergemix.trials import Score, Trial

BINS = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99, 1.01)

POPULATION = 20_000
"""Items whose mean stands for that of all."""


class SharedItems(SyntheticSurface):
    """The surface where every trial is scored on the same items, each as hard as it is.

    An item's score is the logistic of the surface's logit plus its ease, which is linear in the
    mixture: some items are easier for one domain than for another.
    """

    def item_scores(self, points: Array, num: int, rng: np.random.Generator) -> Array:
        """Return ``(P, C, num)`` scores of mixtures ``(P, D)``."""
        odds = np.log(self.accuracies(points) / (1 - self.accuracies(points)))
        shape = (len(self.capabilities), num)
        ease = rng.normal(size=shape) + np.einsum(
            "pd,cnd->pcn", points, rng.normal(size=(*shape, points.shape[1]))
        )
        return np.asarray(1 / (1 + np.exp(-odds[..., None] - ease)))

    def utility(self, points: Array) -> Array:
        """Return the mean over many items ``(P,)``."""
        rng = np.random.default_rng(12345)
        return np.asarray(self.item_scores(points, POPULATION, rng).mean(axis=(1, 2)))

    def measure(self, proposal: Proposal, num_items: int = 300, seed: int = 0) -> Trial:
        """Return the proposal as a finished trial, with the score of every item."""
        trial = super().measure(proposal, num_items, seed)
        point = (
            to_vector(proposal.mixture, self.domains)
            if proposal.mixture
            else uniform(len(self.domains))
        )
        items = self.item_scores(point[None], num_items, np.random.default_rng([seed, 77]))[0]
        scores = {
            name: {
                "accuracy": Score(
                    float(mine.mean()),
                    float(mine.std(ddof=1) / np.sqrt(num_items)),
                    num_items,
                    "accuracy",
                    True,
                    tuple(mine.tolist()),
                )
            }
            for name, mine in zip(self.capabilities, items, strict=True)
        }
        return replace(trial, scores=scores)


SURFACES: Mapping[str, type[SyntheticSurface]] = {"own": SyntheticSurface, "shared": SharedItems}


class Case(NamedTuple):
    """One search: its sizes, its strategy, and the seed of surface and noise."""

    domains: int
    trials: int
    items: str
    num_items: int
    seed: int
    strategy: str
    capabilities: int


class Judged(NamedTuple):
    """What the search said, and what is true."""

    case: Case
    interval: tuple[float, float]
    truth: float
    statements: list[tuple[float, bool]]
    share: float


def judge(case: Case) -> Judged:
    """Return one finished search beside the truth."""
    surface = SURFACES[case.items](case.domains, case.seed, case.capabilities)
    proportional = np.arange(1, case.domains + 1) / np.arange(1, case.domains + 1).sum()
    strategy = make_strategy(
        config.Search.model_validate(
            {"strategy": case.strategy, "trials": case.trials, "seed": case.seed}
        ),
        domains=surface.domains,
        utility=Utility(
            config_evaluate.Utility(normalize="none"),
            {name: ["accuracy"] for name in surface.capabilities},
        ),
        bounds=whole_simplex(case.domains),
        proportional=proportional,
    )
    trials: list[Trial] = []
    while not strategy.done():
        trials += [surface.measure(asked, case.num_items, case.seed) for asked in strategy.ask()]
        strategy.tell(trials)
    advice = strategy.recommend()
    assert advice.interval is not None
    others: dict[str, Any] = {
        "uniform": uniform(case.domains),
        "proportional": proportional,
        "best observed": to_vector(
            advice.alternatives["best observed"]["mixture"], surface.domains
        ),
    }
    points = np.stack(
        [to_vector(advice.mixture, surface.domains), *(others[n] for n in advice.better_than)]
    )
    truth = surface.utility(points)
    statements = [
        (p, bool(truth[0] > other))
        for p, other in zip(advice.better_than.values(), truth[1:], strict=True)
    ]
    return Judged(case, advice.interval, float(truth[0]), statements, advice.as_good["share"])


def report(results: Sequence[Judged]) -> Iterator[str]:
    """Return the lines to print."""
    yield "domains trials    n  inside  below  above   width  as good"
    cells = sorted({(r.case.domains, r.case.trials) for r in results})
    for cell in [*cells, None]:
        mine = [r for r in results if cell in (None, (r.case.domains, r.case.trials))]
        low, high = np.array([r.interval for r in mine]).T
        truth = np.array([r.truth for r in mine])
        name = "    all       " if cell is None else f"{cell[0]:7d} {cell[1]:6d}"
        yield (
            f"{name} {len(mine):4d} {np.mean((low <= truth) & (truth <= high)):7.3f} "
            f"{np.mean(truth < low):6.3f} {np.mean(truth > high):6.3f} "
            f"{100 * np.mean(high - low):6.2f}p {100 * np.mean([r.share for r in mine]):7.2f}%"
        )
    said, true = np.array([pair for r in results for pair in r.statements], dtype=float).T
    yield f"statements: Brier score {np.mean((said - true) ** 2):.4f}"
    for low_bin, high_bin in zip(BINS[:-1], BINS[1:], strict=True):
        mine_bin = (said >= low_bin) & (said < high_bin)
        if mine_bin.any():
            yield (
                f"  said {low_bin:.2f} to {min(high_bin, 1.0):.2f}: {mine_bin.sum():4d}, "
                f"on average {said[mine_bin].mean():.3f}, true {true[mine_bin].mean():.3f}"
            )


def main() -> None:
    """Run the searches and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domains", default="3,5,7")
    parser.add_argument("--trials", default="24,40")
    parser.add_argument("--searches", type=int, default=20, help="per number of domains and trials")
    parser.add_argument("--items", choices=SURFACES, default="own")
    parser.add_argument("--num-items", type=int, default=300)
    parser.add_argument("--capabilities", type=int, default=5)
    parser.add_argument("--strategy", default="mergemix")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    cases = [
        Case(
            d,
            t,
            options.items,
            options.num_items,
            options.seed + n,
            options.strategy,
            options.capabilities,
        )
        for n, d, t in product(
            range(options.searches),
            map(int, options.domains.split(",")),
            map(int, options.trials.split(",")),
        )
    ]
    results = []
    with ProcessPoolExecutor(options.processes) as pool:
        for done, result in enumerate(pool.map(judge, cases), start=1):
            results.append(result)
            if done % 20 == 0 and done < len(cases):
                print(f"{done} of {len(cases)} searches", flush=True)
    print("\n".join(report(results)), flush=True)


if __name__ == "__main__":
    main()
