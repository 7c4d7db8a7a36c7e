"""What the inner products of the task vectors say about merges, without any weights.

``tau_k`` is expert k minus base and ``G`` their inner products ``[K, K]``. A merge applies
``sum_k alpha_k tau_k``, whose norm is ``sqrt(alpha^T G alpha)``. For orthogonal task vectors of one
length that is ``|alpha|``: an equal merge of four moves half as far from the base as an expert,
while a model that is really trained on the mixture moves about as far. So norms along the simplex
show by how much proxies inside it are trained for shorter than those at its corners.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from megatron_mergemix.mixtures.merge_weights import merge_weights
from megatron_mergemix.mixtures.simplex import Array


def norms(products: Array) -> Array:
    """Return the L2 norms of the task vectors ``[K]``."""
    return np.asarray(np.sqrt(np.maximum(products.diagonal(), 0.0)))


def cosines(products: Array) -> Array:
    """Return the cosines between the task vectors ``[K, K]``; 0 beside one that is zero."""
    lengths = norms(products)
    scale = np.outer(lengths, lengths)
    found = np.divide(products, scale, out=np.zeros_like(scale), where=scale > 0)
    return np.asarray(found).clip(-1.0, 1.0)


def applied_norm(products: Array, alpha: Array) -> float:
    """Return the L2 norm of ``sum_k alpha_k tau_k``."""
    return math.sqrt(max(0.0, float(alpha @ products @ alpha)))


def norms_of_mixtures(
    products: Array, matrix: Array, mixtures: Mapping[str, Array | None]
) -> dict[str, float | None]:
    """Return how far the proxy of every mixture is from the base; None for one not known yet.

    Args:
        products: ``[K, K]``.
        matrix: components ``(K, D)``.
        mixtures: name -> ``(D,)``.
    """
    return {
        name: None if mixture is None else _norm(products, matrix, mixture)
        for name, mixture in mixtures.items()
    }


def norms_along_simplex(
    products: Array, matrix: Array, domains: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return the norms at the corners of the simplex, and half way along its edges.

    Returns:
        ``vertices``: domain -> norm; ``edges``: ``"math + code"`` -> norm at equal shares of both.
    """
    corners = dict(zip(domains, np.eye(len(domains)), strict=True))
    edges = {f"{a} + {b}": (corners[a] + corners[b]) / 2 for a, b in combinations(domains, 2)}
    return {
        "vertices": norms_of_mixtures(products, matrix, corners),
        "edges": norms_of_mixtures(products, matrix, edges),
    }


def _norm(products: Array, matrix: Array, mixture: Array) -> float:
    return applied_norm(products, merge_weights(mixture, matrix))
