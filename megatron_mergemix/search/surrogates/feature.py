"""A surrogate on top of a feature: ``score = rho * feature(x) + rest(x)``.

Two proxies of different kind err differently. The rest is what the usual surrogate learns (the
autoregressive law of Kennedy and O'Hagan 2000, with the rest as their discrepancy). The factor
answers for what surrogates cannot tell from other mixtures: with it the leave-one-out errors of
the rest have nothing in common with those of a surrogate for the feature. The feature is used
where the error is less than without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_mergemix.mixtures.simplex import Array
from megatron_mergemix.search.surrogates.choose import fit_surrogate, spearman

Feature = Callable[[Array], Array]
"""Mixtures ``(P, D)`` -> a number that is thought to follow the score ``(P,)``."""


NUM_STEPS = 4
"""With a better factor the rest is smoother, so a surrogate tells more of it, and of the factor."""


class Fitted(Protocol):
    """What a fitted surrogate can do, see its contract."""

    def predict(self, points: Array) -> tuple[Array, Array]:
        """Return the mean and the standard deviation ``(P,)``."""
        ...

    def sample(self, points: Array, num: int, rng: np.random.Generator) -> Array:
        """Return joint draws ``(num, P)``."""
        ...

    def leave_one_out(self) -> Array:
        """Return for each fitted row ``(N,)`` its prediction from all others."""
        ...


class WithFeature:
    """A surrogate that is already fitted to ``values - rho * feature(points)``.

    Args:
        rest: that surrogate.
        rho: the factor.
        feature: the feature.
        left_out: what it predicts for each fitted row from all others, the factor included.
    """

    def __init__(self, rest: Fitted, rho: float, feature: Feature, left_out: Array) -> None:
        self._rest, self.rho, self._feature, self._left_out = rest, rho, feature, left_out

    def predict(self, points: Array) -> tuple[Array, Array]:
        """Return the mean and its standard deviation ``(P,)``, the factor taken as exact."""
        mean, spread = self._rest.predict(points)
        return mean + self.rho * self._feature(points), spread

    def sample(self, points: Array, num: int, rng: np.random.Generator) -> Array:
        """Return draws ``(num, P)``; the factor is taken as exact."""
        return self._rest.sample(points, num, rng) + self.rho * self._feature(points)

    def leave_one_out(self) -> Array:
        """Return for each fitted row ``(N,)`` its prediction from all others."""
        return self._left_out


def fit_with_feature(
    choice: str,
    points: Array,
    values: Array,
    stderrs: Array | None,
    feature: Feature,
    judges: NDArray[np.bool_] | None = None,
) -> tuple[Fitted, dict[str, Any]]:
    """Return a fitted surrogate, with the feature where that predicts left-out rows better.

    Args:
        choice: a name in ``SURROGATES``, or ``auto``.
        points: mixtures ``(N, D)``.
        values: scores ``(N,)``.
        stderrs: ``(N,)``, or None where unknown.
        feature: evaluated at mixtures.
        judges: as for :func:`~megatron_mergemix.search.surrogates.choose.fit_surrogate`.

    Returns:
        As :func:`~megatron_mergemix.search.surrogates.choose.fit_surrogate`, and in the evidence
        ``"ensemble": {"rho", "rmse" with it, "rmse_without", "used"}``.

    Raises:
        SearchError: too few rows.
    """
    plain, evidence = fit_surrogate(choice, points, values, stderrs, judges)
    known = feature(points)
    law = evidence["surrogate"]
    of_feature = known - fit_surrogate(law, points, known, None)[0].leave_one_out()
    rho, rest_errors = 0.0, values - plain.leave_one_out()
    for _ in range(NUM_STEPS):
        rho += _factor(of_feature, rest_errors)[0]
        rest_values = values - rho * known
        rest = fit_surrogate(law, points, rest_values, stderrs)[0]
        rest_errors = rest_values - rest.leave_one_out()
    rest, found = fit_surrogate(choice, points, values - rho * known, stderrs, judges)
    correction = _factor(of_feature, rest_errors + rho * of_feature)[1]
    left_out = rest.leave_one_out() + rho * known - correction
    rmse = float(np.sqrt(np.mean((left_out - values) ** 2)))
    # A factor below zero says that the feature does not follow the score at all.
    used = rho > 0 and rmse < evidence["rmse"]
    report = {"rho": rho, "rmse": rmse, "rmse_without": evidence["rmse"], "used": used}
    if not used:
        return plain, {**evidence, "ensemble": report}
    evidence = {**found, "rmse": rmse, "spearman": spearman(left_out, values)}
    return WithFeature(rest, rho, feature, left_out), {**evidence, "ensemble": report}


def _factor(of_feature: Array, of_score: Array) -> tuple[float, Array]:
    """Return rho, and by how much it favours each left-out row because it has seen it ``(N,)``.

    A row that rho has not seen is missed by ``(rho - rho_without_it) * of_feature`` more.

    Args:
        of_feature: leave-one-out errors of a surrogate for the feature ``(N,)``.
        of_score: those of the same kind of surrogate for the score ``(N,)``.
    """
    squares, products = of_feature**2, of_feature * of_score
    if squares.sum() <= 1e-300 or len(squares) < 2:
        return 0.0, np.zeros(len(squares))
    rho = float(products.sum() / squares.sum())
    without = (products.sum() - products) / np.maximum(squares.sum() - squares, 1e-300)
    return rho, (rho - without) * of_feature
