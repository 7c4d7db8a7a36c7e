"""Which mixtures of a batch are chosen: uncertain ones first, and none that repeats another."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_mergemix.config import evaluate as config_evaluate
from megatron_mergemix.evaluate.utility import Utility
from megatron_mergemix.mixtures.simplex import uniform
from megatron_mergemix.search.bayesian import BETA, _joint_bounds
from megatron_mergemix.search.calibration import utility_scale
from megatron_mergemix.synthetic.surfaces import SyntheticSurface
from tests.unit.search.test_strategies import search, strategy_on


def draws(means: list[float], deviations: list[float], copies: dict[int, int]) -> np.ndarray:
    """Independent Gaussian columns, some of them copies of others."""
    rng = np.random.default_rng(0)
    found = np.array(means) + rng.normal(size=(4000, len(means))) * np.array(deviations)
    for copy, original in copies.items():
        found[:, copy] = found[:, original]
    return found


def test_the_first_of_a_batch_has_the_highest_upper_bound() -> None:
    means, deviations = [0.50, 0.48, 0.40], [0.01, 0.05, 0.06]
    bounds = np.array(means) + np.sqrt(BETA) * np.array(deviations)
    assert np.argmax(bounds) == 1
    assert _joint_bounds(draws(means, deviations, {}), 1) == [1]


def test_a_copy_of_what_was_chosen_comes_after_worse_ones_that_tell_something_new() -> None:
    means, deviations = [0.50, 0.50, 0.49], [0.05, 0.05, 0.05]
    assert _joint_bounds(draws(means, deviations, {1: 0}), 3)[:2] == [0, 2]


def test_no_mixture_is_chosen_twice_and_none_that_is_not_there() -> None:
    assert sorted(_joint_bounds(draws([0.5, 0.5], [0.0, 0.0], {}), 5)) == [0, 1]


def test_an_optimistic_utility_is_that_of_all_capabilities_at_their_bounds() -> None:
    surface = SyntheticSurface(3, seed=0)
    strategy = strategy_on(surface, "bayesian")
    trials = search(surface, strategy)
    landscape = strategy.landscape(strategy._explored(failed=False))
    points = np.array([uniform(3), [0.7, 0.2, 0.1]])
    expected = []
    for surrogate in landscape._surrogates:
        mean, deviation = surrogate.predict(points)
        assert deviation is not None
        expected.append(mean + 2 * deviation)
    utility = Utility(
        config_evaluate.Utility(normalize="none"),
        {name: ["accuracy"] for name in surface.capabilities},
    )
    scale = utility_scale(utility, trials)
    assert landscape.optimistic(points, 2.0) == pytest.approx(
        utility.combine(np.stack(expected, axis=-1), scale)
    )
    assert np.all(landscape.optimistic(points, 2.0) > landscape(points))
