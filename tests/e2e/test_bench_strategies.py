"""The benchmark of strategies, in small: every search runs through and the table is right."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_mergemix.synthetic.surfaces import SyntheticSurface

pytestmark = pytest.mark.nightly

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "bench_strategies.py"


def run(*words: str, without: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    start = [sys.executable, str(TOOL)]
    if without:
        hide = f"import sys; sys.modules[{without!r}] = None; sys.argv = sys.argv[1:];"
        hide += f"sys.path.insert(0, {str(TOOL.parent)!r});"
        start = [sys.executable, "-c", hide + "import bench_strategies as b; b.main()", str(TOOL)]
    return subprocess.run(
        [*start, *words], env=environment, capture_output=True, text=True, timeout=500
    )


def table(printed: str) -> dict[str, tuple[float, float, float]]:
    row = r"^[* ] (\S.*?) +(-?\d+\.\d\d) +(\d+\.\d\d) +(-?\d+\.\d\d)$"
    return {
        name: (float(mean), float(stderr), float(worst))
        for name, mean, stderr, worst in re.findall(row, printed, re.M)
    }


def test_every_search_has_a_row_with_its_regret() -> None:
    pytest.importorskip("lightgbm")
    pytest.importorskip("optuna")
    pytest.importorskip("cmaes")
    ours = ["mergemix", "iterative", "gradient"]
    done = run("--domains", "3", "--trials", "12", "--seeds", "2", "--strategies", *ours)
    assert done.returncode == 0, done.stderr
    rows = table(done.stdout)
    assert list(rows)[:3] == ours
    assert len(rows) == 11
    for mean, stderr, worst in rows.values():
        assert 0 <= mean <= worst
        # Of two values the mean is half a spread, and one standard error, below the worst.
        assert worst - mean == pytest.approx(stderr, abs=0.02)
    assert "mean rank among our strategies over 1 tables: " in done.stdout
    # Where 14 rows make a leaf of 20, LightGBM's prediction is constant and so is its mixture.
    pool_is_ignored = rows["LightGBM default leaf, top-128"][0]
    assert pool_is_ignored > 3 * rows["mergemix"][0]


def test_the_regret_of_a_row_is_that_of_the_recommended_mixture() -> None:
    """The best of random mixtures, found here with nothing of the tool but its random numbers."""
    words = ("--domains", "5", "--trials", "24", "--seeds", "2", "--strategies", "--peers")
    rows = table(run(*words, "random").stdout)
    regrets = []
    for seed in (0, 1):
        surface = SyntheticSurface(5, seed)
        rng = np.random.default_rng([seed, 5, 24])
        gammas = rng.standard_gamma(np.ones(5), size=(26, 5))
        points = gammas / gammas.sum(axis=1, keepdims=True)
        observed = rng.binomial(300, surface.accuracies(points)).mean(axis=1)
        regrets.append(100 * (surface.optimum - surface.utility(points[observed.argmax()])))
    assert rows == {"random, best observed": pytest.approx((*mean_and_error(regrets),), abs=0.006)}


def mean_and_error(regrets: list[float]) -> tuple[float, float, float]:
    return (
        float(np.mean(regrets)),
        float(np.std(regrets, ddof=1) / np.sqrt(len(regrets))),
        float(np.max(regrets)),
    )


def test_what_was_to_be_reached_is_said_only_where_it_was_measured() -> None:
    words = ("--seeds", "2", "--strategies", "mergemix", "--peers")
    done = run("--domains", "5", "--trials", "24", *words)
    assert re.search(
        r"^K=5 B=24: at most 0\.14 by mergemix: \d\.\d{3}, (reached|MISSED)$", done.stdout, re.M
    )
    assert "K=7" not in done.stdout


def test_a_search_whose_package_is_missing_is_left_out_and_named() -> None:
    words = ("--domains", "2", "--trials", "8", "--seeds", "2", "--strategies", "--peers", "random")
    done = run(*words, "CMA-ES", without="cmaes")
    assert done.returncode == 0, done.stderr
    assert "left out: CMA-ES, best observed (pip install cmaes)" in done.stdout
    assert set(table(done.stdout)) == {"random, best observed"}


def test_unknown_words_are_refused() -> None:
    done = run("--peers", "Vizier")
    assert done.returncode == 2
    assert "no peer begins with 'Vizier'" in done.stderr


def told(found: dict[str, list[float]]) -> list[str]:
    """What the tool says of one table of regrets."""
    sys.path.insert(0, str(TOOL.parent))
    try:
        from bench_strategies import BASELINE, verdict
    finally:
        sys.path.remove(str(TOOL.parent))
    rows = {BASELINE if name == "random" else name: np.array(r) for name, r in found.items()}
    return list(verdict({(7, 24): rows}, "mergemix"))


def test_a_strategy_that_blows_up_in_the_mean_or_on_one_surface_is_named() -> None:
    good, bad, risky = [0.1, 0.3, 0.2], [0.9, 0.9, 1.0], [0.0, 0.0, 1.5]
    random = [0.8, 0.9, 1.0]
    lines = told({"mergemix": good, "grid": bad, "iterative": risky, "random": random})
    assert lines[0] == "K=7 B=24: at most 0.39 by mergemix: 0.200, reached"
    assert [line for line in lines if "random" in line] == [
        "K=7 B=24: iterative BLOWS UP: 1.50 on one surface, random, best observed at most 1.00",
        "K=7 B=24: grid is WORSE than random, best observed",
    ]
    assert not any("WORSE" in line or "BLOWS" in line for line in told({"mergemix": good}))


def test_who_is_ahead_of_the_default_beyond_noise_is_named() -> None:
    default, same, ahead = [0.4, 0.5, 0.6], [0.3, 0.7, 0.4], [0.1, 0.2, 0.4]
    lines = told({"mergemix": default, "bayesian": same, "grid": ahead})
    assert [line for line in lines if "ahead" in line] == [
        "K=7 B=24: grid is ahead of mergemix by 0.267 +- 0.033"
    ]
