"""The contract of a surrogate: a regression from mixtures to one capability's score."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from megatron_mergemix.mixtures.simplex import Array


class Surrogate(Protocol):
    """Fits few points and predicts many. Deterministic: no global state, no unseeded choice."""

    @staticmethod
    def min_rows(num_domains: int) -> int:
        """Return how many points a fit needs at least to be worth anything."""
        ...

    def fit(self, points: Array, values: Array, stderrs: Array | None = None) -> None:
        """Learn from measured mixtures.

        Args:
            points: mixtures ``(N, D)``.
            values: their scores ``(N,)``, higher is better.
            stderrs: standard errors of the scores ``(N,)``, or None where unknown.

        Raises:
            SearchError: fewer rows than :meth:`min_rows`.
        """
        ...

    def predict(self, points: Array) -> tuple[Array, Array]:
        """Return the mean and the standard deviation of the noise-free score, ``(P,)`` each."""
        ...

    def sample(self, points: Array, num: int, rng: np.random.Generator) -> Array:
        """Return joint draws of the noise-free scores ``(num, P)`` from what the rows leave open.

        Draws of one row are one surface: their differences between points are as uncertain as the
        surrogate is about them, so they give intervals and probabilities of any function of
        several mixtures. Standard deviations are inflated where the leave-one-out residuals are
        larger than the model says (:func:`~megatron_mergemix.search.surrogates.draws.inflation`).

        Args:
            points: mixtures ``(P, D)``, up to some hundred, repeats allowed.
            num: draws.
            rng: the only source of chance.
        """
        ...

    def leave_one_out(self) -> Array:
        """Return for each fitted row ``(N,)`` its prediction from all others.

        Hyper-parameters stay as chosen on all rows.
        """
        ...
