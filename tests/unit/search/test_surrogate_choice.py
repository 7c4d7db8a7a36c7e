"""What ``auto`` takes, what it records, and that a named surrogate is never replaced."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from megatron_mergemix.errors import SearchError
from megatron_mergemix.mixtures.simplex import sample_uniform, whole_simplex
from megatron_mergemix.search.surrogates import SURROGATES
from megatron_mergemix.search.surrogates.choose import (
    AUTO,
    CLEARLY,
    fit_surrogate,
    min_rows,
    spearman,
)
from tests.support.blocked_imports import run_without


def points(num, num_domains, seed=0):
    return sample_uniform(whole_simplex(num_domains), num, np.random.default_rng(seed))


def smooth(x):
    return 1 / (1 + np.exp(-3 * x[:, 0] + 5 * x[:, 1] ** 2)) + x[:, -1] ** 3


def steep(x):
    return x[:, 0] ** 0.3 + 0.5 * x[:, 2] ** 0.2


def test_spearman_is_the_rank_correlation():
    assert spearman(np.array([1.0, 2, 3, 10]), np.array([2.0, 3, 9, 10])) == pytest.approx(1.0)
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([1.0, 3, 2, 4])) == pytest.approx(0.8)
    assert spearman(np.array([1.0, 2, 3]), np.array([5.0, 5, 5])) == 0.0


def test_auto_takes_the_root_for_scores_that_are_steep_near_zero():
    rng = np.random.default_rng(0)
    x = rng.dirichlet(np.full(4, 0.5), size=40)
    _, evidence = fit_surrogate("auto", x, steep(x), None)
    assert evidence["surrogate"] == "gp_root"
    assert evidence["candidates"]["gp_root"]["lead"] > CLEARLY


def test_auto_judges_by_the_rows_that_may():
    rng = np.random.default_rng(0)
    x = rng.dirichlet(np.full(4, 0.5), size=40)
    judges = np.arange(40) < 20
    y = np.where(judges, steep(x), steep(x) + rng.normal(size=40))  # the others are noise
    errors = np.where(judges, 0.01, 1.0)
    _, evidence = fit_surrogate("auto", x, y, errors, judges)
    assert evidence["candidates"]["gp_root"]["lead"] > CLEARLY
    _, all_judge = fit_surrogate("auto", x, y, errors)
    assert all_judge["candidates"]["gp_root"]["lead"] < CLEARLY
    nobody = fit_surrogate("auto", x, steep(x), None, np.zeros(40, dtype=bool))[1]
    assert nobody["surrogate"] == "gp"


def test_auto_takes_the_gp_for_a_peak():
    x = points(40, 4)
    bump = np.exp(-20 * ((x - np.array([0.4, 0.1, 0.3, 0.2])) ** 2).sum(axis=1))
    _, evidence = fit_surrogate("auto", x, bump, None)
    assert evidence["surrogate"] == "gp"


def test_auto_stays_with_the_gp_where_another_is_better_by_chance():
    luckier = 0
    for seed in range(8):
        x = points(24, 4, seed)
        y = smooth(x) + 0.2 * np.random.default_rng(seed).normal(size=24)
        _, evidence = fit_surrogate("auto", x, y, np.full(24, 0.2))
        found = evidence["candidates"]
        luckier += min(AUTO, key=lambda name: found[name].get("rmse", np.inf)) != "gp"
        assert evidence["surrogate"] == "gp" or found[evidence["surrogate"]]["lead"] > CLEARLY
    assert luckier > 0


def test_auto_takes_no_surrogate_that_ranks_worse_however_small_its_errors(monkeypatch):
    """A stand-in whose left-out errors are small, but in the wrong order."""
    x = points(40, 4)
    y = smooth(x)

    class Flat(SURROGATES["gp_root"]):
        def leave_one_out(self):
            return y.mean() + 1e-3 * (y.mean() - y)

    class Noisy(SURROGATES["gp"]):
        def leave_one_out(self):
            return y.mean() + 4.0 * (y - y.mean())

    monkeypatch.setitem(SURROGATES, "gp", Noisy)
    monkeypatch.setitem(SURROGATES, "gp_root", Flat)
    _, evidence = fit_surrogate("auto", x, y, None)
    found = evidence["candidates"]["gp_root"]
    assert found["lead"] > CLEARLY
    assert found["spearman"] < evidence["candidates"]["gp"]["spearman"]
    assert evidence["surrogate"] != "gp_root"


def test_auto_does_not_judge_by_trials_of_a_single_domain():
    # Steep only towards the corners: what is better there alone is not better.
    x = np.concatenate([np.eye(4), points(30, 4)])
    y = np.concatenate([[5.0, -5, 5, -5], smooth(x[4:])])
    _, evidence = fit_surrogate("auto", x, y, None)
    squares = {}
    for name in AUTO:
        surrogate = SURROGATES[name]()
        surrogate.fit(x, y, None)
        squares[name] = (surrogate.leave_one_out() - y) ** 2
    for name in AUTO[1:]:
        gains = squares["gp"] - squares[name]
        inner, every = (g.mean() / (g.std(ddof=1) / np.sqrt(len(g))) for g in (gains[4:], gains))
        assert evidence["candidates"][name]["lead"] == pytest.approx(inner)
        assert inner != pytest.approx(every, abs=0.05)


def test_auto_records_both_criteria_of_all_candidates():
    x = points(40, 4)
    surrogate, evidence = fit_surrogate("auto", x, smooth(x), None)
    assert tuple(evidence["candidates"]) == AUTO
    assert all(set(c) == {"spearman", "rmse", "lead"} for c in evidence["candidates"].values())
    taken = evidence["candidates"][evidence["surrogate"]]
    assert isinstance(surrogate, SURROGATES[evidence["surrogate"]])
    assert evidence["candidates"]["gp"]["lead"] == 0.0
    left_out = surrogate.leave_one_out()
    assert taken["spearman"] == evidence["spearman"] == spearman(left_out, smooth(x))
    assert taken["rmse"] == evidence["rmse"]
    assert taken["rmse"] == pytest.approx(np.sqrt(np.mean((left_out - smooth(x)) ** 2)))


def test_auto_passes_over_a_surrogate_with_too_few_rows_and_says_so():
    x = points(24, 7)
    _, evidence = fit_surrogate("auto", x, smooth(x), None)
    assert evidence["candidates"]["quadratic"] == {"refused": "24 trials, needs 42"}


def test_auto_refuses_what_even_the_gp_refuses():
    x = points(8, 7)
    with pytest.raises(SearchError, match="gp surrogate needs at least 9"):
        fit_surrogate("auto", x, smooth(x), None)


def test_a_named_surrogate_is_never_replaced():
    x = points(24, 7)
    with pytest.raises(SearchError, match="quadratic surrogate needs at least 42"):
        fit_surrogate("quadratic", x, smooth(x), None)
    assert min_rows("quadratic", 7) == 42
    assert min_rows("auto", 7) == 9


def test_lightgbm_is_refused_without_its_package_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SearchError, match=r"pip install 'megatron-mergemix\[lightgbm\]'"):
        min_rows("lightgbm", 4)
    x = points(24, 4)
    with pytest.raises(SearchError, match="not installed"):
        fit_surrogate("lightgbm", x, smooth(x), None)


def test_nothing_but_a_fit_of_its_own_imports_lightgbm():
    done = run_without(
        ("lightgbm",),
        "import numpy as np; "
        "from megatron_mergemix.search.surrogates.choose import fit_surrogate; "
        "x = np.random.default_rng(0).dirichlet(np.ones(3), 24); "
        "fit_surrogate('auto', x, x[:, 0] + x[:, 1] ** 2, None)",
    )
    assert done.returncode == 0, done.stderr
