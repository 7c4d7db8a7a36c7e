"""What the experts together would predict, without merging any: a second, free proxy.

Every expert's probability of every held-out token is measured once. For any mixture the experts'
probabilities are averaged with its merge weights, ``p = sum_k alpha_k p_k``, and ``-log p``,
averaged over the tokens, predicts the loss of a model trained on it (Belenki et al., MDE, arXiv
2502.15950). That costs no forward pass. The merged models remain the first proxy: the ensemble
enters their surrogates as a feature, see :mod:`megatron_mergemix.search.surrogates.feature`.

An average of probabilities needs weights that are not negative. Where the experts have a general
share, pure mixtures lie outside the hull of what the experts were trained on, and some of their
merge weights are negative; there the nearest nonnegative weights that sum to one stand in. So the
ensemble is flat beyond the hull, and only the merged models tell what happens there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np

from megatron_mergemix.mixtures.simplex import Array, project, whole_simplex

NUM_ROWS = 4096
"""Rows that stand for all tokens of a capability."""

CHUNK = 500
"""Mixtures that are predicted together; bounds the memory."""

LEAST_LOG = -700.0
"""Below it a double has no exponential."""


class TokenTable(NamedTuple):
    """The log-likelihoods of the tokens of one capability by K experts, in few rows.

    Attributes:
        level: mean over tokens of the best expert's log-likelihood, in nats.
        relative: log-likelihoods relative to the best expert's, ``(R, K)``.
        weights: share of the tokens that each row stands for ``(R,)``.
    """

    level: float
    relative: Array
    weights: Array


def token_table(log_likelihoods: Array, num_rows: int = NUM_ROWS) -> TokenTable:
    """Return a table of tokens ``(T, K)``.

    More tokens than ``num_rows`` are grouped by how the experts differ on them, and a group is
    its mean. The level is split off before and exact, and so is the loss of every single expert;
    between them the prediction is a little high, by how much log-likelihoods differ within a
    group. Groups come from halving at the median along the widest axis, as a k-d tree does.
    """
    best = log_likelihoods.max(axis=1)
    relative = np.maximum(log_likelihoods - best[:, None], LEAST_LOG)
    groups = [np.arange(len(relative))]
    while 2 * len(groups) <= num_rows and len(groups[0]) > 1:
        groups = [half for group in groups for half in _halves(relative, group)]
    return TokenTable(
        float(best.mean()),
        np.array([relative[group].mean(axis=0) for group in groups]),
        np.array([len(group) / len(relative) for group in groups]),
    )


def _halves(relative: Array, group: np.ndarray) -> list[np.ndarray]:
    if len(group) < 2:
        return [group]
    axis = int(np.argmax(relative[group].std(axis=0)))
    order = np.argsort(relative[group, axis], kind="stable")
    return np.array_split(group[order], 2)


def log_likelihood(table: TokenTable, alpha: Array) -> Array:
    """Return the ensemble's mean log-likelihood ``(P,)`` in nats for weights ``(P, K)``.

    The weights are not negative and sum to one.
    """
    probabilities = np.exp(table.relative).T
    parts = np.split(alpha, range(CHUNK, len(alpha), CHUNK))
    return np.concatenate(
        [table.level + np.log(part @ probabilities) @ table.weights for part in parts]
    )


def ensemble_weights(points: Array, matrix: Array) -> Array:
    """Return nonnegative weights ``(P, K)`` of the experts for mixtures ``(P, D)``.

    The merge weights, projected onto the simplex where some are negative.

    Args:
        points: mixtures.
        matrix: what the experts were trained on, as rows ``(K, D)``.
    """
    alpha = points
    if not np.array_equal(matrix, np.eye(len(matrix))):
        alpha = np.linalg.lstsq(matrix.T, points.T, rcond=None)[0].T
    return project(alpha, whole_simplex(len(matrix)))


class Ensemble:
    """Predicts the held-out log-likelihood of any mixture, per capability.

    Args:
        matrix: what the experts were trained on, as rows ``(K, D)``.
        load: returns capability -> log-likelihoods of its tokens by the experts ``(T, K)``; called
            when a prediction is first wanted.
    """

    def __init__(self, matrix: Array, load: Callable[[], Mapping[str, Array]]) -> None:
        self._matrix = matrix
        self._load = load

    @cached_property
    def _tables(self) -> dict[str, TokenTable]:
        return {name: token_table(values) for name, values in self._load().items()}

    @property
    def capabilities(self) -> Collection[str]:
        """Return those that have held-out tokens; the others are not predicted."""
        return self._tables.keys()

    def __call__(self, capability: str, points: Array) -> Array:
        """Return the mean log-likelihood ``(P,)`` in nats per token of mixtures ``(P, D)``."""
        return log_likelihood(self._tables[capability], ensemble_weights(points, self._matrix))
