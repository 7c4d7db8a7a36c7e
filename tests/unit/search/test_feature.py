"""A second proxy as a feature of a surrogate: where it helps, and where it does not."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from megatron_mergemix.config import evaluate as config_evaluate
from megatron_mergemix.evaluate.utility import Utility
from megatron_mergemix.mixtures.simplex import sample_uniform, to_mixture, whole_simplex
from megatron_mergemix.search.ensemble import Ensemble
from megatron_mergemix.search.landscape import Landscape
from megatron_mergemix.search.surrogates.choose import fit_surrogate
from megatron_mergemix.search.surrogates.feature import _factor, fit_with_feature
from megatron_mergemix.trials import Score, Trial

DOMAINS = 5


def ragged(points):
    """What two proxies share and 24 points cannot teach: ridges in many directions."""
    rng = np.random.default_rng(8)
    directions = 9 * rng.normal(size=(12, points.shape[1]))
    return np.cos(points @ directions.T + rng.uniform(0, 6, size=12)).mean(axis=1)


def smooth(points):
    return (points @ np.arange(DOMAINS)) / 4 - ((points - 0.3) ** 2).sum(axis=1)


def score(points):
    return 0.8 * ragged(points) + smooth(points)


def mixtures(num, seed):
    return sample_uniform(whole_simplex(DOMAINS), num, np.random.default_rng(seed))


def error(surrogate, points):
    return float(np.sqrt(np.mean((surrogate.predict(points)[0] - score(points)) ** 2)))


def test_a_feature_that_follows_the_score_halves_the_error_on_unseen_mixtures():
    unseen = mixtures(500, 99)
    for seed in range(3):
        points = mixtures(24, seed)
        noise = 0.01 * np.random.default_rng(seed).normal(size=24)
        plain, without = fit_surrogate("gp", points, score(points) + noise, None)
        fitted, evidence = fit_with_feature("gp", points, score(points) + noise, None, ragged)
        assert evidence["ensemble"]["used"]
        assert evidence["ensemble"]["rho"] == pytest.approx(0.8, abs=0.15)
        assert error(fitted, unseen) < 0.5 * error(plain, unseen)
        assert evidence["rmse"] == evidence["ensemble"]["rmse"] < without["rmse"]
        assert evidence["spearman"] > without["spearman"]


def test_a_feature_of_noise_is_hardly_ever_used_and_then_changes_little():
    unseen = mixtures(500, 99)
    used = 0
    for seed in range(8):
        points = mixtures(24, seed)
        values = smooth(points) + 0.02 * np.random.default_rng(seed).normal(size=24)
        plain, without = fit_surrogate("quadratic", points, values, None)
        anything = partial(_hash, seed)
        fitted, evidence = fit_with_feature("quadratic", points, values, None, anything)
        used += evidence["ensemble"]["used"]
        if not evidence["ensemble"]["used"]:
            assert (fitted.predict(unseen)[0] == plain.predict(unseen)[0]).all()
            assert {**evidence, "ensemble": None} == {**without, "ensemble": None}
    assert used <= 3


def _hash(seed, points):
    """A number per mixture that has nothing to do with it."""
    return np.modf(1e4 * np.sin(points @ np.arange(1, DOMAINS + 1) * (seed + 1.7)))[0]


def test_a_feature_that_is_linear_says_nothing_new():
    points = mixtures(24, 0)
    fitted, evidence = fit_with_feature("gp", points, score(points), None, lambda x: 3 * x[:, 0])
    assert not evidence["ensemble"]["used"]


def test_a_feature_that_runs_against_the_score_is_not_used():
    points = mixtures(24, 0)
    _, evidence = fit_with_feature("gp", points, score(points), None, lambda x: -ragged(x))
    assert evidence["ensemble"]["rho"] < 0
    assert not evidence["ensemble"]["used"]


def test_left_out_rows_do_not_profit_from_a_factor_that_has_seen_them():
    rng = np.random.default_rng(4)
    of_feature, of_score = rng.normal(size=12), rng.normal(size=12)
    rho, correction = _factor(of_feature, of_score)
    assert rho == pytest.approx(np.linalg.lstsq(of_feature[:, None], of_score, rcond=None)[0][0])
    for left in range(12):
        rest = np.arange(12) != left
        without = np.linalg.lstsq(of_feature[rest, None], of_score[rest], rcond=None)[0][0]
        # error without having seen the row, less the error of having seen it
        missed = (of_score - without * of_feature)[left] - (of_score - rho * of_feature)[left]
        assert correction[left] == pytest.approx(missed)


def test_draws_and_predictions_hold_the_feature():
    points, elsewhere = mixtures(24, 0), mixtures(6, 1)
    fitted, _ = fit_with_feature("gp", points, score(points), None, ragged)
    draws = fitted.sample(elsewhere, 4000, np.random.default_rng(0))
    mean, spread = fitted.predict(elsewhere)
    assert draws.mean(axis=0) == pytest.approx(mean, abs=0.1 * spread.max())
    assert draws.std(axis=0) == pytest.approx(spread, rel=0.1)


# ---- in the landscape ----


def trials_of(points, rng):
    values = score(points) + 0.01 * rng.normal(size=len(points))
    names = [f"domain{index}" for index in range(DOMAINS)]
    return [
        Trial(
            index,
            "lattice",
            to_mixture(point, names),
            {},
            {"web": {"loss": Score(-float(value), 0.01, 100, "nats/token", False)}},
        )
        for index, (point, value) in enumerate(zip(points, values, strict=True), start=1)
    ], names


class Told(Ensemble):
    """An ensemble that predicts by a formula, in place of tokens."""

    capabilities = ("web",)

    def __init__(self):
        super().__init__(np.eye(DOMAINS), lambda: {})

    def __call__(self, capability, points):
        assert capability == "web"
        return ragged(points)


def test_the_landscape_takes_the_ensemble_where_it_helps_and_is_unchanged_without():
    trials, names = trials_of(mixtures(24, 0), np.random.default_rng(0))
    utility = Utility(config_evaluate.Utility(normalize="none"), {"web": ["loss"]})
    scale = utility.calibrate(np.zeros((3, 1)), np.ones(3, dtype=bool))
    plain = Landscape(trials, names, utility, scale, "gp")
    with_it = Landscape(trials, names, utility, scale, "gp", Told())
    unseen = mixtures(500, 99)
    errors = [np.sqrt(np.mean((each(unseen) - score(unseen)) ** 2)) for each in (plain, with_it)]
    assert errors[1] < 0.5 * errors[0]
    assert with_it.evidence["web"]["ensemble"]["used"]
    assert "ensemble" not in plain.evidence["web"]
    other = Utility(config_evaluate.Utility(normalize="none"), {"quiz": ["acc"]})
    renamed = [replace(t, scores={"quiz": {"acc": t.scores["web"]["loss"]}}) for t in trials]
    without_tokens = Landscape(renamed, names, other, scale, "gp", Told())
    assert "ensemble" not in without_tokens.evidence["quiz"]
    again = with_it.learned_from(trials, names)
    assert again.evidence["web"]["ensemble"]["used"]
