from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from megatron_mergemix.errors import SearchError
from megatron_mergemix.mixtures.simplex import sample_uniform, uniform, whole_simplex
from megatron_mergemix.search.design import design
from megatron_mergemix.search.surrogates import SURROGATES
from megatron_mergemix.search.surrogates.choose import spearman
from megatron_mergemix.synthetic.surfaces import SyntheticSurface


def points(num, num_domains, seed=0):
    return sample_uniform(whole_simplex(num_domains), num, np.random.default_rng(seed))


def smooth(x):
    """A concave surface whose logistic and cubic parts no quadratic holds exactly."""
    return 1 / (1 + np.exp(-3 * x[:, 0] + 5 * x[:, 1] ** 2)) + x[:, -1] ** 3


@pytest.mark.parametrize(
    ("name", "largest", "least"),
    # A monotone law cannot bend back, and trees are stairs.
    [
        ("gp", 0.1, 0.99),
        ("gp_root", 0.15, 0.98),
        ("quadratic", 0.15, 0.98),
        ("loglinear", 0.35, 0.95),
        ("lightgbm", 0.4, 0.9),
    ],
)
def test_every_surrogate_predicts_a_smooth_surface_it_has_not_seen(name, largest, least):
    x, unseen = points(40, 4), points(500, 4, seed=1)
    surrogate = SURROGATES[name]()
    surrogate.fit(x, smooth(x))
    mean, _ = surrogate.predict(unseen)
    error = np.sqrt(np.mean((mean - smooth(unseen)) ** 2)) / smooth(unseen).std()
    assert error < largest
    assert spearman(mean, smooth(unseen)) > least


@pytest.mark.parametrize("name", SURROGATES)
def test_every_surrogate_is_deterministic_and_ignores_the_order_of_rows(name):
    x = points(30, 4)
    order = np.random.default_rng(0).permutation(30)
    results = []
    for rows in (np.arange(30), np.arange(30), order):
        surrogate = SURROGATES[name]()
        surrogate.fit(x[rows], smooth(x)[rows], np.full(30, 0.01))
        results.append(surrogate.predict(points(50, 4, seed=1))[0])
    assert np.array_equal(results[0], results[1])
    assert np.abs(results[0] - results[2]).max() < 1e-3


@pytest.mark.parametrize("name", SURROGATES)
def test_every_surrogate_moves_and_scales_with_the_scores(name):
    x, unseen = points(30, 4), points(50, 4, seed=1)
    stderrs = np.full(30, 0.01)
    plain, moved = SURROGATES[name](), SURROGATES[name]()
    plain.fit(x, smooth(x), stderrs)
    moved.fit(x, 1000 * smooth(x) - 5e4, 1000 * stderrs)
    expected = 1000 * plain.predict(unseen)[0] - 5e4
    assert np.abs(moved.predict(unseen)[0] - expected).max() < 1.0


@pytest.mark.parametrize("name", SURROGATES)
def test_every_surrogate_takes_constant_scores_as_constant(name):
    x = points(30, 4)
    surrogate = SURROGATES[name]()
    surrogate.fit(x, np.full(30, 0.7), np.full(30, 0.02))
    assert np.abs(surrogate.predict(points(50, 4, seed=1))[0] - 0.7).max() < 1e-3


@pytest.mark.parametrize("name", SURROGATES)
def test_every_surrogate_refuses_too_few_rows_with_the_numbers(name):
    needed = SURROGATES[name].min_rows(5)
    x = points(needed, 5)
    SURROGATES[name]().fit(x, smooth(x))
    with pytest.raises(SearchError, match=f"at least {needed} .* 5 domains.*; got {needed - 1}"):
        SURROGATES[name]().fit(x[1:], smooth(x)[1:])


@pytest.mark.parametrize("name", SURROGATES)
def test_every_surrogate_believes_noisy_rows_less(name):
    stderrs = np.where(np.arange(40) % 2 == 0, 0.04, 0.4)
    unseen = points(300, 3, seed=1)
    errors = {True: [], False: []}
    for seed in range(4):
        x = points(40, 3, seed)
        y = smooth(x) + stderrs * np.random.default_rng(seed).normal(size=40)
        for known, found in errors.items():
            surrogate = SURROGATES[name]()
            surrogate.fit(x, y, stderrs if known else None)
            found.append(np.abs(surrogate.predict(unseen)[0] - smooth(unseen)).mean())
    assert np.mean(errors[True]) < 0.9 * np.mean(errors[False])


@pytest.mark.parametrize(
    ("num_domains", "num_rows"), [(3, 24), (3, 112), (5, 40), (7, 64), (15, 40), (15, 112)]
)
@pytest.mark.parametrize("name", SURROGATES)
def test_no_surrogate_explodes_between_the_trials_of_a_design(name, num_domains, num_rows):
    if num_rows < SURROGATES[name].min_rows(num_domains):
        with pytest.raises(SearchError, match="needs at least"):
            SURROGATES[name]().fit(*measured(num_domains, num_rows))
        return
    x, y, stderrs = measured(num_domains, num_rows)
    surrogate = SURROGATES[name]()
    surrogate.fit(x, y, stderrs)
    dense = np.concatenate([points(2000, num_domains, seed=1), np.eye(num_domains)])
    mean, std = surrogate.predict(dense)
    assert np.isfinite(mean).all()
    assert np.isfinite(std).all()
    assert mean.max() < y.max() + np.ptp(y) / 2
    assert mean.min() > y.min() - np.ptp(y) / 2
    truth = SyntheticSurface(num_domains, 0, num_capabilities=1).accuracies(dense)[:, 0]
    # The law without a bend is drawn to a corner, wherever the middle is best.
    least = y.min() if name == "loglinear" else np.median(truth[:2000])
    assert truth[mean.argmax()] > least - 0.05


@cache
def measured(num_domains, num_rows):
    """Return the design of a search, and accuracies of 300 questions with their errors."""
    surface = SyntheticSurface(num_domains, 0, num_capabilities=1)
    bounds = whole_simplex(num_domains)
    x = np.array([point for _, point in design(bounds, uniform(num_domains), num_rows, 0)])
    y = np.random.default_rng(0).binomial(300, surface.accuracies(x)[:, 0]) / 300
    return x, y, np.sqrt(y * (1 - y) / 300)
