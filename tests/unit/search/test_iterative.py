"""Later rounds are drawn from what the rounds before predict to be best."""

from __future__ import annotations

import numpy as np

from megatron_mergemix.mixtures.simplex import dense_points, to_vector
from megatron_mergemix.search.iterative import BEST
from megatron_mergemix.synthetic.surfaces import SyntheticSurface
from tests.unit.search.test_strategies import strategy_on


def test_a_later_round_is_drawn_from_the_best_predicted_mixtures_and_from_all_of_them() -> None:
    surface = SyntheticSurface(4, seed=3)
    strategy = strategy_on(surface, "iterative", trials=40)
    trials = [surface.measure(proposal, 300, 3) for proposal in strategy.ask()]
    strategy.tell(trials)
    second = strategy.ask()
    assert {proposal.purpose for proposal in second} == {"round:2"}
    landscape = strategy.landscape([trial for trial in trials if trial.mixture])
    points = dense_points(strategy.bounds, np.random.default_rng(99))
    predicted = landscape(points)
    asked = np.array([to_vector(p.mixture, surface.domains) for p in second])
    ranks = (predicted > landscape(asked)[:, None]).mean(axis=1)
    assert ranks.max() < 1.5 * BEST, "all are among the best"
    assert ranks.max() > BEST / 4, "and not the very best alone"
