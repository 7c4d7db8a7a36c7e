"""The contract of a surrogate: a regression from mixtures to one capability's score."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


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

    def predict(self, points: Array) -> tuple[Array, Array | None]:
        """Return the mean and, where the model has one, its standard deviation, ``(P,)`` each."""
        ...

    def leave_one_out(self) -> Array:
        """Return for each fitted row ``(N,)`` its prediction from all others.

        Hyper-parameters stay as chosen on all rows.
        """
        ...
