"""The Gaussian processes, on shares and on their roots."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import check_grad

from megatron_mergemix.mixtures.simplex import sample_uniform, whole_simplex
from megatron_mergemix.search.surrogates import gp, noise
from megatron_mergemix.search.surrogates.choose import spearman
from megatron_mergemix.search.surrogates.gp import GaussianProcess
from megatron_mergemix.search.surrogates.gp_root import RootGaussianProcess


def points(num, num_domains, seed=0):
    return sample_uniform(whole_simplex(num_domains), num, np.random.default_rng(seed))


def smooth(x):
    """A concave surface whose logistic and cubic parts no quadratic holds exactly."""
    return 1 / (1 + np.exp(-3 * x[:, 0] + 5 * x[:, 1] ** 2)) + x[:, -1] ** 3


def test_gp_likelihood_has_the_gradient_it_says():
    rng = np.random.default_rng(0)
    x, y, shape = points(24, 5), rng.normal(size=24), rng.random(24) + 0.1
    squares = (x[:, None] - x[None]) ** 2
    priors = np.array([gp.LENGTH] * 5 + [gp.FACTOR] * 3 + [gp.KNOWN_NOISE])

    def cost(theta):
        return gp._cost(theta, squares, x @ x.T, y, shape, priors)

    theta = 0.5 * rng.normal(size=9)
    scale = np.abs(cost(theta)[1]).max()
    assert check_grad(lambda t: cost(t)[0], lambda t: cost(t)[1], theta) < 1e-5 * scale


def test_gp_leave_one_out_is_the_posterior_without_the_row():
    x = points(20, 4)
    y = smooth(x) + 0.02 * np.random.default_rng(1).normal(size=20)
    stderrs = np.linspace(0.01, 0.03, 20)
    surrogate = GaussianProcess()
    surrogate.fit(x, y, stderrs)
    shape, _ = gp._noise_shape(stderrs, 20, y.std())
    noise = np.exp(2 * surrogate._theta[-1]) * shape + gp.JITTER
    targets = (y - y.mean()) / y.std()
    for row in range(20):
        rest = np.arange(20) != row
        covariance = gp._kernel(x[rest], x[rest], surrogate._theta) + np.diag(noise[rest])
        cross = gp._kernel(x[[row]], x[rest], surrogate._theta)
        mean = (cross @ np.linalg.solve(covariance, targets[rest])).item()
        assert surrogate.leave_one_out()[row] == pytest.approx(y.mean() + y.std() * mean, abs=1e-6)


def test_gp_covers_the_truth_with_its_standard_deviation():
    hits = []
    for seed in range(6):
        x, unseen = points(40, 4, seed), points(200, 4, seed + 100)
        y = smooth(x) + 0.02 * np.random.default_rng(seed).normal(size=40)
        surrogate = GaussianProcess()
        surrogate.fit(x, y, np.full(40, 0.02))
        mean, std = surrogate.predict(unseen)
        hits.append(np.mean(np.abs(mean - smooth(unseen)) < 2 * std))
    assert 0.85 < np.mean(hits) < 1.0


def test_gp_does_not_take_errors_common_to_all_trials_for_noise():
    # Scores on the same items: a standard error of 0.2 each, but exact differences.
    x = points(40, 4)
    surrogate = GaussianProcess()
    surrogate.fit(x, smooth(x) + 0.17, np.full(40, 0.2))
    unseen = points(300, 4, seed=1)
    assert np.abs(surrogate.predict(unseen)[0] - smooth(unseen) - 0.17).mean() < 0.02


def test_gp_does_not_take_an_error_of_zero_for_certainty():
    # An accuracy of exactly 0 or 1 has the binomial standard error 0.
    lifted = noise.usable_errors(np.array([0.0, 0.02, 0.02, 0.04]))
    assert lifted.tolist() == pytest.approx([0.005, 0.02, 0.02, 0.04])
    assert noise.row_weights(np.array([0.0, 0.02, 0.02, 0.04]), 4).tolist() == [4, 1, 1, 0.5]
    assert noise.usable_errors(np.array([0.0, 0.0, 0.02])) is None
    assert noise.usable_errors(np.array([0.01, np.nan, 0.02])) is None


def test_gp_survives_few_rows_in_many_domains():
    x = points(20, 15)
    surrogate = GaussianProcess()
    surrogate.fit(x, 3 * x[:, 0] - 2 * x[:, 1], None)
    assert spearman(surrogate.predict(x)[0], 3 * x[:, 0] - 2 * x[:, 1]) > 0.95


def test_gp_holds_a_quadratic_of_which_the_corners_are_the_only_hint():
    # A design of few trials is corners and little else; what lies between is far from all.
    x = np.concatenate([np.eye(6), points(8, 6)])
    unseen = points(300, 6, seed=1)
    surrogate = GaussianProcess()
    surrogate.fit(x, -((x - 0.2) ** 2).sum(axis=1), None)
    truth = -((unseen - 0.2) ** 2).sum(axis=1)
    error = np.sqrt(np.mean((surrogate.predict(unseen)[0] - truth) ** 2))
    assert error < 0.35 * truth.std()  # 0.47 without the quadratic part


def test_gp_root_ranks_scores_that_are_steep_near_zero_and_gp_does_not():
    rng = np.random.default_rng(0)
    x, unseen = rng.dirichlet(np.full(8, 0.3), size=40), rng.dirichlet(np.full(8, 0.3), size=300)

    def steep(at):
        return at[:, 0] ** 0.3 + 0.5 * at[:, 1] ** 0.2

    ranks = []
    for kind in (GaussianProcess, RootGaussianProcess):
        surrogate = kind()
        surrogate.fit(x, steep(x), None)
        ranks.append(spearman(surrogate.predict(unseen)[0], steep(unseen)))
    assert ranks[1] > 0.98
    assert ranks[0] < ranks[1] - 0.05


def test_gp_root_takes_a_share_that_rounding_left_below_zero():
    x = points(20, 3)
    surrogate = RootGaussianProcess()
    surrogate.fit(x, smooth(x), None)
    mean, std = surrogate.predict(np.array([[0.5, 0.5 + 1e-17, -1e-17]]))
    assert np.isfinite([mean, std]).all()
