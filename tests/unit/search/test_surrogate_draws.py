"""What the draws of every surrogate promise: they agree with predict, and they are calibrated."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_mergemix.mixtures.simplex import sample_uniform, whole_simplex
from megatron_mergemix.search.surrogates import SURROGATES, draws
from megatron_mergemix.search.surrogates.draws import inflation, joint_draws, misfit
from megatron_mergemix.synthetic.surfaces import SyntheticSurface


def points(num, num_domains, seed=0):
    return sample_uniform(whole_simplex(num_domains), num, np.random.default_rng(seed))


def fitted(name, num_rows=40, num_domains=4, seed=0, items=300):
    """Return the surrogate fitted to noisy accuracies, and the noise-free accuracy."""
    surface = SyntheticSurface(num_domains, seed, num_capabilities=1)
    x = points(num_rows, num_domains, seed)
    truth = surface.accuracies(x)[:, 0]
    y = np.random.default_rng([seed, 1]).binomial(items, truth) / items
    surrogate = SURROGATES[name]()
    surrogate.fit(x, y, np.sqrt(y * (1 - y) / items))
    return surrogate, lambda at: surface.accuracies(at)[:, 0]


@pytest.mark.parametrize("name", SURROGATES)
def test_draws_have_the_mean_and_standard_deviation_of_predict(name):
    surrogate, _ = fitted(name)
    unseen = points(60, 4, seed=9)
    mean, std = surrogate.predict(unseen)
    drawn = surrogate.sample(unseen, 4000, np.random.default_rng(0))
    assert drawn.shape == (4000, 60)
    assert np.abs(drawn.mean(axis=0) - mean).max() < 0.1 * std.max()
    assert np.abs(drawn.std(axis=0) / std - 1).max() < 0.1


@pytest.mark.parametrize("name", SURROGATES)
def test_draws_of_near_mixtures_go_together(name):
    surrogate, _ = fitted(name)
    here = points(1, 4, seed=9)
    near, far = here + 0.001 * (np.eye(4)[0] - here), np.eye(4)[[3]]
    drawn = surrogate.sample(np.concatenate([here, near, far]), 2000, np.random.default_rng(0))
    correlation = np.corrcoef(drawn.T)
    assert correlation[0, 1] > 0.99
    assert correlation[0, 1] > correlation[0, 2] + 0.2


@pytest.mark.parametrize("name", SURROGATES)
def test_draws_take_repeated_points_and_hundreds_of_them(name):
    surrogate, _ = fitted(name)
    unseen = points(150, 4, seed=9)
    drawn = surrogate.sample(np.repeat(unseen, 2, axis=0), 50, np.random.default_rng(0))
    assert np.isfinite(drawn).all()
    assert np.abs(drawn[:, ::2] - drawn[:, 1::2]).max() < 0.02 * drawn.std(axis=0).max()


@pytest.mark.parametrize("name", SURROGATES)
def test_draws_depend_on_the_generator_alone(name):
    surrogate, _ = fitted(name)
    again, _ = fitted(name)
    unseen = points(20, 4, seed=9)
    first = surrogate.sample(unseen, 5, np.random.default_rng(3))
    assert np.array_equal(first, again.sample(unseen, 5, np.random.default_rng(3)))
    assert not np.array_equal(first, surrogate.sample(unseen, 5, np.random.default_rng(4)))


@pytest.mark.parametrize("name", SURROGATES)
def test_central_intervals_of_the_draws_hold_the_truth_about_as_often_as_they_say(name):
    hits = {0.8: [], 0.95: []}
    for seed in range(12):
        surrogate, truth = fitted(name, seed=seed)
        unseen = points(200, 4, seed=seed + 100)
        drawn = surrogate.sample(unseen, 400, np.random.default_rng(0))
        for level, found in hits.items():
            low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
            found.append(np.mean((low <= truth(unseen)) & (truth(unseen) <= high)))
    assert 0.68 < np.mean(hits[0.8]) < 0.95
    assert np.mean(hits[0.95]) > 0.86


@pytest.mark.parametrize("name", SURROGATES)
def test_constant_scores_leave_nearly_nothing_open(name):
    x = points(30, 4)
    surrogate = SURROGATES[name]()
    surrogate.fit(x, np.full(30, 0.7), np.full(30, 0.02))
    drawn = surrogate.sample(points(20, 4, seed=1), 50, np.random.default_rng(0))
    assert np.isfinite(drawn).all()
    assert np.abs(drawn.mean(axis=0) - 0.7).max() < 0.1


def test_a_covariance_of_rank_one_gives_equal_draws_and_none_gives_the_mean():
    rng = np.random.default_rng(0)
    equal = joint_draws(np.zeros(5), np.ones((5, 5)), 1000, rng)
    assert np.ptp(equal, axis=1).max() < 1e-3
    assert 0.9 < equal.std() < 1.1
    assert (joint_draws(np.arange(3.0), np.zeros((3, 3)), 4, rng) == np.arange(3.0)).all()


def test_uncertainty_grows_to_explain_the_errors_beyond_noise_and_never_shrinks():
    variances, noise = np.full(50, 0.04), np.full(50, 0.09)
    # 0.04 * 2^2 + 0.09 = 0.5^2
    assert inflation(np.full(50, 0.5), variances, noise) == pytest.approx(2.0)
    assert inflation(np.full(50, 0.1), variances, noise) == 1.0
    assert inflation(np.full(50, 9.0), variances, noise) == draws.MOST_INFLATION
    assert inflation(np.zeros(2), np.zeros(2), np.zeros(2)) == 1.0


def test_misfit_is_what_coefficients_and_noise_do_not_explain():
    assert misfit(np.full(50, 0.5), np.full(50, 0.09)) == pytest.approx(0.4)
    assert misfit(np.full(50, 0.5), np.full(50, 0.3)) == 0.0
    assert misfit(np.zeros(3), np.zeros(3)) == 0.0
    # One row without which a coefficient is unknown hides nothing of what the others show.
    variances = np.append(np.full(49, 0.09), 100.0)
    assert misfit(np.full(50, 0.5), variances) == pytest.approx(0.4, abs=0.01)
