"""Searches of others, as they are published, for the benchmark of strategies.

Each gets ``measure(points (P, D)) -> accuracies (P, C)``, a number of measurements and a random
generator, and returns the mixture it would train on. Those without a surrogate return the best
that they observed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from megatron_mergemix.mixtures.simplex import (
    dense_points,
    project,
    sample_dirichlet,
    whole_simplex,
)
from megatron_mergemix.search.selection import top_mean

Array = NDArray[np.float64]
Measure = Callable[[Array], Array]
Peer = Callable[[Measure, int, int, np.random.Generator], Array]
"""``(measure, num_domains, budget, rng) -> mixture (D,)``."""

SMALL_LEAVES = {"num_leaves": 15, "max_depth": 4, "min_child_samples": 5, "min_data_in_bin": 1}
"""What lets LightGBM split a few dozen rows at all; depth and leaf size are those of CLIMB."""

TOP_K = 128
"""Mixtures that RegMix and DeMix average."""


def random_search(
    measure: Measure, num_domains: int, budget: int, rng: np.random.Generator
) -> Array:
    """Return the best observed of evenly drawn mixtures."""
    points = sample_dirichlet(np.ones(num_domains), budget, rng)
    return _best(points, measure(points))


def lightgbm_default(
    measure: Measure, num_domains: int, budget: int, rng: np.random.Generator
) -> Array:
    """Return RegMix's pick (arXiv 2407.01492): LightGBM's default leaves of 20 rows."""
    points = sample_dirichlet(np.ones(num_domains), budget, rng)
    return _top(_trees(points, measure(points), {}), num_domains, rng)


def lightgbm_small(
    measure: Measure, num_domains: int, budget: int, rng: np.random.Generator
) -> Array:
    """Return the same pick with small leaves."""
    points = sample_dirichlet(np.ones(num_domains), budget, rng)
    return _top(_trees(points, measure(points), SMALL_LEAVES), num_domains, rng)


def lightgbm_rounds(
    measure: Measure, num_domains: int, budget: int, rng: np.random.Generator
) -> Array:
    """Return the pick of CLIMB and DeMix: three rounds 4 to 2 to 1, drawn from the best tenth."""
    sizes = [budget * 4 // 7, budget * 2 // 7]
    sizes.append(budget - sum(sizes))
    points = sample_dirichlet(np.ones(num_domains), sizes[0], rng)
    scores = measure(points)
    for size in sizes[1:]:
        pool = dense_points(whole_simplex(num_domains), rng)
        order = np.argsort(-_trees(points, scores, SMALL_LEAVES)(pool), kind="stable")
        chosen = pool[rng.choice(order[: len(pool) // 10], size, replace=False)]
        points, scores = np.concatenate([points, chosen]), np.concatenate([scores, measure(chosen)])
    return _top(_trees(points, scores, SMALL_LEAVES), num_domains, rng)


def quadratic_top(
    measure: Measure, num_domains: int, budget: int, rng: np.random.Generator
) -> Array:
    """Return the mean of the best mixtures of a full quadratic with a touch of ridge."""
    points = sample_dirichlet(np.ones(num_domains), budget, rng)
    return _top(_quadratic(points, measure(points)), num_domains, rng)


def quadratic_argmax(
    measure: Measure, num_domains: int, budget: int, rng: np.random.Generator
) -> Array:
    """Return the best mixture of the same quadratic."""
    points = sample_dirichlet(np.ones(num_domains), budget, rng)
    predict = _quadratic(points, measure(points))
    pool = dense_points(whole_simplex(num_domains), rng)
    return np.asarray(pool[int(np.argmax(predict(pool)))])


def cma_es(measure: Measure, num_domains: int, budget: int, rng: np.random.Generator) -> Array:
    """Return the best observed of CMA-ES on normalised weights, as mergekit-evolve searches."""
    import cmaes

    optimizer = cmaes.CMA(
        mean=np.full(num_domains, 0.5),
        sigma=0.3,
        bounds=np.tile([0.0, 1.0], (num_domains, 1)),
        seed=int(rng.integers(2**31)),
    )
    points, scores = np.zeros((0, num_domains)), np.zeros((0, 1))
    while len(points) < budget:
        asked = np.array([optimizer.ask() for _ in range(optimizer.population_size)])
        mixtures = _normalised(asked)[: budget - len(points)]
        measured = measure(mixtures).mean(axis=1)
        points, scores = (
            np.concatenate([points, mixtures]),
            np.concatenate([scores, measured[:, None]]),
        )
        if len(mixtures) == len(asked):
            optimizer.tell([(x, -float(y)) for x, y in zip(asked, measured, strict=True)])
    return _best(points, scores)


def optuna_tpe(measure: Measure, num_domains: int, budget: int, rng: np.random.Generator) -> Array:
    """Return the best observed of Optuna's default sampler on normalised weights, as OptiMer."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=int(rng.integers(2**31)))
    )
    points, scores = [], []
    for _ in range(budget):
        trial = study.ask()
        weights = [trial.suggest_float(f"w{index}", 0.0, 1.0) for index in range(num_domains)]
        points.append(_normalised(np.array([weights]))[0])
        scores.append(float(measure(points[-1][None]).mean()))
        study.tell(trial, scores[-1])
    return _best(np.array(points), np.array(scores)[:, None])


PEERS: dict[str, Peer] = {
    "random, best observed": random_search,
    "LightGBM default leaf, top-128": lightgbm_default,
    "LightGBM small leaf, top-128": lightgbm_small,
    "LightGBM 3 rounds, top-128": lightgbm_rounds,
    "quadratic, top-128": quadratic_top,
    "quadratic, argmax": quadratic_argmax,
    "CMA-ES, best observed": cma_es,
    "Optuna TPE, best observed": optuna_tpe,
}
"""Name in the table -> search."""

NEEDS = {"LightGBM": "lightgbm", "CMA-ES": "cmaes", "Optuna": "optuna"}
"""First word of the name -> the package without which a search cannot run."""


def _normalised(weights: Array) -> Array:
    totals = weights.sum(axis=1, keepdims=True)
    uniform = np.full_like(weights, 1 / weights.shape[1])
    return np.where(totals > 0, weights / np.where(totals > 0, totals, 1.0), uniform)


def _best(points: Array, scores: Array) -> Array:
    return np.asarray(points[int(np.argmax(scores.mean(axis=1)))])


def _top(predict: Callable[[Array], Array], num_domains: int, rng: np.random.Generator) -> Array:
    pool = dense_points(whole_simplex(num_domains), rng)
    return project(top_mean(pool, predict(pool), TOP_K), whole_simplex(num_domains))


def _trees(points: Array, scores: Array, settings: dict[str, int]) -> Callable[[Array], Array]:
    """Return the mean over capabilities of LightGBM regressions (DeMix: rate 0.02, 300 trees)."""
    from lightgbm import LGBMRegressor

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about leaves that cannot be split: what is shown here
        models = [
            LGBMRegressor(
                learning_rate=0.02, n_estimators=300, verbose=-1, n_jobs=1, **settings
            ).fit(points, column)
            for column in scores.T
        ]
    return lambda pool: np.mean([model.booster_.predict(pool) for model in models], axis=0)


def _quadratic(points: Array, scores: Array) -> Callable[[Array], Array]:
    """Return the mean over capabilities of Scheffe's quadratics with ridge 1e-3."""
    from sklearn.linear_model import Ridge

    first, second = np.triu_indices(points.shape[1], k=1)

    def features(x: Array) -> Array:
        return np.concatenate([x, x[:, first] * x[:, second]], axis=1)

    model = Ridge(alpha=1e-3, fit_intercept=False).fit(features(points), scores.mean(axis=1))
    return lambda pool: np.asarray(model.predict(features(pool)))
