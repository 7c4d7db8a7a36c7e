"""How sure a recommendation is: against answers in closed form, and against the truth."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest

from megatron_mergemix.mixtures.simplex import Bounds, uniform, whole_simplex, within
from megatron_mergemix.search.uncertainty import how_sure, no_preference

DOMAINS = ["a", "b", "c"]
WINNER = np.array([0.2, 0.3, 0.5])
PROPORTIONAL = np.array([0.6, 0.3, 0.1])
GOALS = {"uniform": uniform(3), "proportional": PROPORTIONAL}
NORMAL = NormalDist()


class Known:
    """A posterior with a formula: ``mean(x) + common + x @ slopes``, all of it normal."""

    items = "new items"

    def __init__(self, mean, common=0.0, slope=0.0):
        self.mean, self.common, self.slope = mean, common, slope

    def sample(self, points, num, rng):
        common = self.common * rng.normal(size=(num, 1))
        slopes = self.slope * rng.normal(size=(num, points.shape[1]))
        return self.mean(points) + common + slopes @ points.T


def judged(posterior, rivals=GOALS, bounds=None, preference=no_preference, seed=0):
    bounds = bounds or whole_simplex(3)
    return how_sure(WINNER, rivals, GOALS, DOMAINS, bounds, posterior, preference, seed)


def peak(points):
    return 1.0 - ((points - WINNER) ** 2).sum(axis=1)


def below_a_third(points):
    """Equally good where the first share is below 0.3, hopeless elsewhere."""
    return np.where(points[:, 0] < 0.3, 0.0, -1.0)


def test_interval_and_probabilities_are_those_of_the_posterior():
    sure = judged(Known(peak, common=0.3, slope=0.1))
    spread = np.hypot(0.3, 0.1 * np.linalg.norm(WINNER))
    half = NORMAL.inv_cdf(0.975) * spread
    assert sure.interval == pytest.approx((1 - half, 1 + half), abs=0.06 * half)
    for name, rival in GOALS.items():
        distance = np.linalg.norm(WINNER - rival)
        expected = NORMAL.cdf(distance**2 / (0.1 * distance))
        assert sure.better_than[name] == pytest.approx(expected, abs=0.02)
    assert 0.7 < sure.better_than["uniform"] < 0.99


def test_an_error_that_all_mixtures_share_widens_the_interval_alone():
    sure = judged(Known(peak, common=5.0))
    assert sure.interval[1] - sure.interval[0] > 15
    assert sure.better_than == {"uniform": 1.0, "proportional": 1.0}
    assert sure.as_good["share"] == 0.0


def test_the_set_of_mixtures_as_good_is_where_the_winner_is_not_surely_better():
    # |x - winner|^2 / (slope |x - winner|) < the 0.95 quantile: a disc around the winner.
    radius = 0.1 * NORMAL.inv_cdf(0.95)
    good = judged(Known(peak, slope=0.1)).as_good
    # The simplex has the area sqrt(3) / 2; the disc lies within it.
    assert good["share"] == pytest.approx(np.pi * radius**2 / (np.sqrt(3) / 2), abs=0.03)
    reach = radius * np.sqrt(2 / 3)  # of one share, when all three keep their sum
    for domain, share in zip(DOMAINS, WINNER, strict=True):
        assert good["least"][domain] == pytest.approx(share - reach, abs=0.03)
        assert good["largest"][domain] == pytest.approx(share + reach, abs=0.03)


def test_the_share_of_mixtures_as_good_is_a_volume_within_the_bounds():
    everywhere = judged(Known(below_a_third)).as_good
    assert everywhere["share"] == pytest.approx(1 - 0.7**2, abs=0.05)
    half = Bounds(np.zeros(3), np.array([0.6, 1.0, 1.0]))
    bounded = judged(Known(below_a_third), bounds=half).as_good
    assert bounded["share"] == pytest.approx((1 - 0.7**2) / (1 - 0.4**2), abs=0.05)
    assert everywhere["largest"]["a"] == pytest.approx(0.3, abs=0.01)
    assert everywhere["least"]["a"] == pytest.approx(0.0, abs=0.01)


def test_practical_mixtures_are_the_nearest_of_those_as_good():
    good = judged(Known(below_a_third)).as_good
    nearest = np.array(list(good["nearest"]["uniform"].values()))
    assert 0.28 < nearest[0] < 0.3
    assert np.abs(nearest - uniform(3)).sum() < 0.12
    flat = judged(Known(lambda points: np.zeros(len(points)))).as_good
    assert list(flat["nearest"]["proportional"].values()) == pytest.approx(PROPORTIONAL.tolist())


def test_a_set_too_small_for_any_evenly_spread_mixture_still_has_its_ranges():
    sure = judged(Known(peak, slope=0.002))
    reach = 0.002 * NORMAL.inv_cdf(0.95) * np.sqrt(2 / 3)
    assert sure.as_good["share"] == 0.0
    for domain, share in zip(DOMAINS, WINNER, strict=True):
        assert share - 1.5 * reach < sure.as_good["least"][domain] < share - 0.5 * reach
        assert share + 0.5 * reach < sure.as_good["largest"][domain] < share + 1.5 * reach


def test_a_preference_decides_comparisons_and_leaves_the_interval():
    against_winner = judged(
        Known(peak, common=0.3, slope=0.1), preference=lambda points: -5 * points[:, 2]
    )
    plain = judged(Known(peak, common=0.3, slope=0.1))
    assert against_winner.interval == plain.interval
    assert against_winner.better_than["uniform"] < 0.01
    assert against_winner.as_good["share"] > 5 * plain.as_good["share"]


@pytest.mark.parametrize("floor", [0.0, 0.15])
def test_bounds_hold_for_every_mixture_that_is_looked_at(floor):
    bounds = Bounds(np.array([0.1, 0.2, 0.0]), np.array([0.5, 0.6, 0.55]), floor)
    seen = []

    class Spy(Known):
        def sample(self, points, num, rng):
            seen.append(points)
            return super().sample(points, num, rng)

    goals = {"uniform": uniform(3)}
    how_sure(WINNER, goals, goals, DOMAINS, bounds, Spy(peak, slope=0.1))
    points = np.concatenate(seen)
    assert len(points) > 1000
    assert within(points, bounds).all()


def test_the_same_seed_gives_the_same_answer():
    first, again, other = (judged(Known(peak, slope=0.1), seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.interval != other.interval
