from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import check_grad

from megatron_mergemix.errors import SearchError
from megatron_mergemix.search.surrogates import SURROGATES, gp, quadratic
from megatron_mergemix.search.surrogates.choose import fit_surrogate, min_rows, spearman
from megatron_mergemix.search.surrogates.gp import GaussianProcess
from megatron_mergemix.search.surrogates.quadratic import Quadratic
from megatron_mergemix.simplex import sample_uniform, whole_simplex


def points(num, num_domains, seed=0):
    return sample_uniform(whole_simplex(num_domains), num, np.random.default_rng(seed))


def smooth(x):
    """A concave surface whose logistic and cubic parts no quadratic holds exactly."""
    return 1 / (1 + np.exp(-3 * x[:, 0] + 5 * x[:, 1] ** 2)) + x[:, -1] ** 3


def quadratic_surface(x):
    return 1 + 2 * x[:, 0] - x[:, 1] + 3 * x[:, 0] * x[:, 1] - 4 * x[:, 1] * x[:, 2]


@pytest.mark.parametrize("name", SURROGATES)
def test_every_surrogate_predicts_a_smooth_surface_it_has_not_seen(name):
    x, unseen = points(40, 4), points(500, 4, seed=1)
    surrogate = SURROGATES[name]()
    surrogate.fit(x, smooth(x))
    mean, _ = surrogate.predict(unseen)
    error = np.sqrt(np.mean((mean - smooth(unseen)) ** 2)) / smooth(unseen).std()
    assert error < 0.15
    assert spearman(mean, smooth(unseen)) > 0.98


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


# ---- quadratic ----


@pytest.mark.parametrize(("domains", "rows"), [(3, 9), (4, 15), (5, 23), (7, 42)])
def test_quadratic_wants_one_and_a_half_rows_per_coefficient(domains, rows):
    assert Quadratic.min_rows(domains) == rows


def test_quadratic_finds_a_quadratic_exactly():
    x, unseen = points(20, 4), points(100, 4, seed=1)
    surrogate = Quadratic()
    surrogate.fit(x, quadratic_surface(x))
    assert np.abs(surrogate.predict(unseen)[0] - quadratic_surface(unseen)).max() < 1e-5


def test_quadratic_leave_one_out_is_what_refitting_gives():
    x = points(20, 4)
    y = smooth(x) + 0.05 * np.random.default_rng(2).normal(size=20)
    surrogate = Quadratic()
    surrogate.fit(x, y)
    for row in range(20):
        rest = np.arange(20) != row
        _, coefficients, _ = Quadratic._fit_ridge(x[rest], y[rest], surrogate.ridge)
        again = quadratic._features(x[[row]]) @ coefficients
        assert surrogate.leave_one_out()[row] == pytest.approx(float(again[0]), abs=1e-6)


def test_quadratic_shrinks_to_the_linear_law_under_pure_noise():
    x = points(30, 4)
    y = 2 * x[:, 0] - x[:, 1] + 0.3 * np.random.default_rng(3).normal(size=30)
    surrogate = Quadratic()
    surrogate.fit(x, y)
    assert surrogate.ridge > 1e-2
    assert surrogate.predict(np.eye(4))[1] is None


# ---- gp ----


def test_gp_likelihood_has_the_gradient_it_says():
    rng = np.random.default_rng(0)
    x, y, shape = points(24, 5), rng.normal(size=24), rng.random(24) + 0.1
    squares = (x[:, None] - x[None]) ** 2
    priors = np.array([gp.LENGTH_PRIOR] * 5 + [gp.FACTOR_PRIOR] * 2 + [gp.KNOWN_NOISE_PRIOR])

    def cost(theta):
        return gp._cost(theta, squares, x @ x.T, y, shape, priors)

    theta = 0.5 * rng.normal(size=8)
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


def test_gp_believes_noisy_rows_less():
    x = points(40, 3)
    stderrs = np.where(np.arange(40) % 2 == 0, 0.04, 0.4)
    y = smooth(x) + stderrs * np.random.default_rng(0).normal(size=40)
    unseen = points(300, 3, seed=1)
    errors = []
    for known in (stderrs, None):
        surrogate = GaussianProcess()
        surrogate.fit(x, y, known)
        errors.append(np.abs(surrogate.predict(unseen)[0] - smooth(unseen)).mean())
    assert errors[0] < 0.06
    assert errors[0] < 0.7 * errors[1]


def test_gp_does_not_take_an_error_of_zero_for_certainty():
    # An accuracy of exactly 0 or 1 has the binomial standard error 0.
    shape, _ = gp._noise_shape(np.array([0.0, 0.02, 0.02, 0.04]), 4, 1.0)
    assert shape.tolist() == pytest.approx([0.005**2, 0.02**2, 0.02**2, 0.04**2])


def test_gp_survives_few_rows_in_many_domains():
    x = points(20, 15)
    surrogate = GaussianProcess()
    surrogate.fit(x, 3 * x[:, 0] - 2 * x[:, 1], None)
    assert spearman(surrogate.predict(x)[0], 3 * x[:, 0] - 2 * x[:, 1]) > 0.95


# ---- auto ----


def test_spearman_is_the_rank_correlation():
    assert spearman(np.array([1.0, 2, 3, 10]), np.array([2.0, 3, 9, 10])) == pytest.approx(1.0)
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([1.0, 3, 2, 4])) == pytest.approx(0.8)
    assert spearman(np.array([1.0, 2, 3]), np.array([5.0, 5, 5])) == 0.0


def test_auto_takes_the_quadratic_for_a_noisy_quadratic_and_the_gp_for_a_peak():
    # On the peak the rank correlation would prefer the quadratic.
    x = points(40, 4)
    noise = np.random.default_rng(0).normal(size=40)
    _, evidence = fit_surrogate("auto", x, quadratic_surface(x) + 0.3 * noise, None)
    assert evidence["surrogate"] == "quadratic"
    bump = np.exp(-20 * ((x - np.array([0.4, 0.1, 0.3, 0.2])) ** 2).sum(axis=1))
    _, evidence = fit_surrogate("auto", x, bump, None)
    assert evidence["surrogate"] == "gp"


def test_auto_records_the_numbers_of_all_candidates():
    x = points(40, 4)
    surrogate, evidence = fit_surrogate("auto", x, smooth(x), None)
    assert set(evidence["candidates"]) == set(SURROGATES)
    taken = evidence["candidates"][evidence["surrogate"]]
    assert isinstance(surrogate, SURROGATES[evidence["surrogate"]])
    assert taken["rmse"] == min(c["rmse"] for c in evidence["candidates"].values())
    assert (
        taken["spearman"] == evidence["spearman"] == spearman(surrogate.leave_one_out(), smooth(x))
    )
    assert taken["rmse"] == evidence["rmse"]


def test_auto_passes_over_a_surrogate_with_too_few_rows_and_says_so():
    x = points(24, 7)
    _, evidence = fit_surrogate("auto", x, smooth(x), None)
    assert evidence["surrogate"] == "gp"
    assert evidence["candidates"]["quadratic"] == {"refused": "24 trials, needs 42"}


def test_a_named_surrogate_is_never_replaced():
    x = points(24, 7)
    with pytest.raises(SearchError, match="quadratic surrogate needs at least 42"):
        fit_surrogate("quadratic", x, smooth(x), None)
    assert min_rows("quadratic", 7) == 42
    assert min_rows("auto", 7) == 9
