"""The laws of fixed form: Scheffe's quadratic and the log-linear one."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import check_grad

from megatron_mergemix.mixtures.simplex import sample_uniform, whole_simplex
from megatron_mergemix.search.surrogates import loglinear, quadratic
from megatron_mergemix.search.surrogates.loglinear import LogLinear
from megatron_mergemix.search.surrogates.quadratic import Quadratic


def points(num, num_domains, seed=0):
    return sample_uniform(whole_simplex(num_domains), num, np.random.default_rng(seed))


def smooth(x):
    """A concave surface whose logistic and cubic parts no quadratic holds exactly."""
    return 1 / (1 + np.exp(-3 * x[:, 0] + 5 * x[:, 1] ** 2)) + x[:, -1] ** 3


def quadratic_surface(x):
    return 1 + 2 * x[:, 0] - x[:, 1] + 3 * x[:, 0] * x[:, 1] - 4 * x[:, 1] * x[:, 2]


SLOPES = np.array([-2.0, 0.5, 1.0, -0.5])


def law(x):
    """Minus a loss that falls to 1.5."""
    return -1.5 - np.exp(x @ SLOPES)


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
        again = quadratic._features(x[[row]])
        again = (
            again
            @ quadratic._fit_ridge(x[rest], y[rest], np.ones(19), surrogate.ridge).coefficients
        )
        assert surrogate.leave_one_out()[row] == pytest.approx(float(again[0]), abs=1e-6)


def test_what_a_quadratic_missed_is_told_beside_each_row_s_own_noise(monkeypatch):
    x, told = points(30, 3), []
    stderrs = np.where(np.arange(30) % 2, 0.1, 0.4)
    y = quadratic_surface(x) + stderrs * np.random.default_rng(1).normal(size=30)
    monkeypatch.setattr(
        quadratic, "misfit", lambda residuals, variances: told.append(variances) or 0
    )
    surrogate = Quadratic()
    surrogate.fit(x, y, stderrs)
    weights = np.median(stderrs) / stderrs
    rows = weights[:, None] * quadratic._features(x)
    penalty = np.full(rows.shape[1], surrogate.ridge)
    penalty[:3] = 1e-10
    whole = np.linalg.inv(rows.T @ rows + np.diag(penalty))
    noise = surrogate._covariance[0, 0] / whole[0, 0]
    for row in range(30):
        rest = np.delete(rows, row, axis=0)
        without = np.linalg.inv(rest.T @ rest + np.diag(penalty))
        feature = quadratic._features(x[[row]])[0]
        expected = noise * feature @ without @ feature + stderrs[row] ** 2
        assert told[0][row] == pytest.approx(expected, rel=1e-4)


def test_quadratic_shrinks_to_the_linear_law_under_pure_noise():
    x = points(30, 4)
    y = 2 * x[:, 0] - x[:, 1] + 0.3 * np.random.default_rng(3).normal(size=30)
    surrogate = Quadratic()
    surrogate.fit(x, y)
    assert surrogate.ridge > 1e-2


# ---- loglinear ----


def test_loglinear_finds_its_law():
    x, unseen = points(24, 4), points(200, 4, seed=1)
    surrogate = LogLinear()
    surrogate.fit(x, law(x))
    assert np.abs(surrogate.predict(unseen)[0] - law(unseen)).max() < 0.02 * law(unseen).std()


def test_loglinear_finds_its_law_under_noise_where_the_limit_is_hard_to_see():
    x, unseen = points(40, 4), points(200, 4, seed=1)
    errors = []
    for seed in range(5):
        y = law(x) + 0.05 * np.random.default_rng(seed).normal(size=40)
        surrogate = LogLinear()
        surrogate.fit(x, y, np.full(40, 0.05))
        errors.append(np.sqrt(np.mean((surrogate.predict(unseen)[0] - law(unseen)) ** 2)))
    assert np.mean(errors) < 0.04


def test_loglinear_takes_a_straight_line_as_one():
    x, unseen = points(30, 4), points(200, 4, seed=1)
    surrogate = LogLinear()
    surrogate.fit(x, x @ SLOPES)
    error = surrogate.predict(unseen)[0] - unseen @ SLOPES
    assert np.abs(error).max() < 0.1 * (unseen @ SLOPES).std()


def test_loglinear_has_the_slopes_it_says():
    x = points(12, 4)
    weights, rng = np.linspace(0.5, 2, 12), np.random.default_rng(0)
    arguments = (x, rng.normal(size=12), weights, 0.1, 1.0)
    at = rng.normal(size=5)
    for row in range(12 + 4 + 1):
        difference = check_grad(
            lambda t, row=row: loglinear._residuals(t, *arguments)[row],
            lambda t, row=row: loglinear._jacobian(t, *arguments)[row],
            at,
        )
        assert difference < 1e-5


def test_loglinear_leave_one_out_is_nearly_what_refitting_gives():
    x = points(24, 4)
    y = law(x) + 0.05 * np.random.default_rng(2).normal(size=24)
    surrogate = LogLinear()
    surrogate.fit(x, y)
    again = []
    for row in range(24):
        rest = np.arange(24) != row
        refitted = LogLinear()
        refitted._center, refitted._spread = surrogate._center, surrogate._spread
        refitted._top = surrogate._top
        targets = (y[rest] - surrogate._center) / surrogate._spread
        fit = refitted._fit_ridge(
            x[rest], targets, np.ones(23), surrogate.ridge, [surrogate._theta]
        )
        refitted._theta = fit.theta
        again.append(refitted._mean(x[[row]])[0])
    moved = np.abs(np.array(again) - surrogate._mean(x)).max()
    assert np.abs(surrogate.leave_one_out() - again).max() < 0.25 * moved


def test_loglinear_survives_scores_that_follow_no_law():
    x = points(40, 4)
    for seed in range(5):
        y = np.random.default_rng(seed).normal(size=40)
        surrogate = LogLinear()
        surrogate.fit(x, y)
        assert np.abs(surrogate.predict(np.eye(4))[0]).max() < 20
