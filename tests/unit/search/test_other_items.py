"""What drawing other items would change, against formulas and other items themselves."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_mergemix.config import evaluate as config_evaluate
from megatron_mergemix.evaluate.utility import Scale, Utility
from megatron_mergemix.mixtures.simplex import lattice, to_mixture
from megatron_mergemix.search.other_items import OtherItems
from megatron_mergemix.trials import Score, Trial

DOMAINS = ["a", "b", "c"]
NUM_ITEMS = 60


def item_losses(points, items):
    """Losses ``(P, items)``: every item is a quadratic of the mixture with its own optimum."""
    rng = np.random.default_rng([3, items])
    best, bend = rng.dirichlet(np.ones(3), size=items), rng.uniform(0.5, 4.0, size=(items, 3))
    level = rng.normal(5.0, 2.0, size=items)
    return level + (bend * (points[:, None] - best) ** 2).sum(axis=-1)


def score(losses, keep=True):
    return Score(
        value=float(losses.mean()),
        stderr=float(losses.std(ddof=1) / np.sqrt(len(losses))),
        num_samples=len(losses),
        unit="nats/token",
        higher_is_better=False,
        items=tuple(losses.tolist()) if keep else (),
    )


def trials_of(points, num_items=NUM_ITEMS, keep=lambda index: True):
    return [
        Trial(
            index,
            "lattice",
            to_mixture(point, DOMAINS),
            {},
            {"web": {"loss": score(losses, keep(index)), "other": score(2 * losses)}},
        )
        for index, (point, losses) in enumerate(
            zip(points, item_losses(points, num_items), strict=True), start=1
        )
    ]


def utility_of(*metrics):
    return Utility(config_evaluate.Utility(normalize="none"), {"web": list(metrics)})


POINTS = lattice(3, 4)


def test_differences_between_trials_have_their_paired_standard_error():
    trials = trials_of(POINTS)
    draws = OtherItems(trials, DOMAINS, utility_of("loss")).sample(
        POINTS, 4000, np.random.default_rng(0)
    )[..., 0]
    scale = Scale(np.zeros(1), np.ones(1))
    for first, second in ((0, 5), (2, 14), (7, 8)):
        gain = utility_of("loss").gain(trials[first].scores, trials[second].scores, scale)
        spread = (draws[:, first] - draws[:, second]).std()
        assert spread == pytest.approx(gain.stderr, rel=0.06)
    assert draws[:, 4].std() == pytest.approx(trials[4].scores["web"]["loss"].stderr, rel=0.05)


def test_a_mixture_that_was_not_measured_deviates_as_its_own_items_say():
    trials = trials_of(POINTS)
    elsewhere = np.array([[0.4, 0.35, 0.25], [0.1, 0.6, 0.3]])
    draws = OtherItems(trials, DOMAINS, utility_of("loss")).sample(
        elsewhere, 4000, np.random.default_rng(0)
    )[..., 0]
    losses = item_losses(elsewhere, NUM_ITEMS)
    expected = np.cov(losses) / NUM_ITEMS
    assert np.cov(draws.T) == pytest.approx(expected, rel=0.08)


def test_items_that_are_equally_hard_for_all_mixtures_do_not_blur_their_differences():
    level = np.random.default_rng(1).normal(size=50)
    trials = [
        Trial(i, "lattice", to_mixture(p, DOMAINS), {}, {"web": {"loss": score(level + p[0])}})
        for i, p in enumerate(POINTS, start=1)
    ]
    draws = OtherItems(trials, DOMAINS, utility_of("loss")).sample(
        np.array([[0.2, 0.3, 0.5], [0.8, 0.1, 0.1]]), 2000, np.random.default_rng(0)
    )[..., 0]
    assert draws[:, 0].std() == pytest.approx(level.std(ddof=1) / np.sqrt(50), rel=0.05)
    assert (draws[:, 0] - draws[:, 1]).std() < 0.001 * draws[:, 0].std()


def test_the_metrics_of_a_capability_have_items_of_their_own():
    trials = trials_of(POINTS)
    draws = OtherItems(trials, DOMAINS, utility_of("loss", "other")).sample(
        POINTS[4:5], 4000, np.random.default_rng(0)
    )
    stderrs = [trials[4].scores["web"][metric].stderr for metric in ("loss", "other")]
    assert draws.std() == pytest.approx(np.hypot(*stderrs) / 2, rel=0.05)


def test_a_capability_whose_items_are_not_all_kept_does_not_deviate():
    trials = trials_of(POINTS, keep=lambda index: index != 3)
    other = OtherItems(trials, DOMAINS, utility_of("loss"))
    assert other.known == []
    assert not other.sample(POINTS, 10, np.random.default_rng(0)).any()
    assert OtherItems(trials[3:], DOMAINS, utility_of("loss")).known == ["web"]
