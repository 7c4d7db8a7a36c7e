"""From mixtures to merge weights and back, by what the experts were trained on.

A component is what one expert was trained on, itself a mixture; K components are the rows of the
component matrix ``M`` (K x D). Merge weights ``alpha`` (one per expert) stand for the mixture
``alpha @ M``, so a wanted mixture is solved for its merge weights. All arrays are float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from megatron_mergemix.mixtures.simplex import Array


def component_matrix(num_domains: int, general_share: float, general_mixture: ArrayLike) -> Array:
    """Return what expert k was trained on, as row k of a ``(D, D)`` matrix.

    ``(1 - general_share) I + general_share * 1 general_mixture^T`` (DeMix, arXiv 2602.00747);
    exactly the identity for a share of 0 (MergeMix, arXiv 2601.17858).
    """
    if general_share == 0:
        return np.eye(num_domains)
    general = np.asarray(general_mixture, dtype=np.float64)
    return (1 - general_share) * np.eye(num_domains) + general_share * general[None, :]


def merge_weights(mixture: ArrayLike, matrix: Array) -> Array:
    """Return the merge weights that stand for the mixture: ``alpha @ matrix = mixture``.

    With more components than domains, those of least norm: of all that stand for the mixture
    they let the least noise of the experts' training through, so even the mixture of one component
    is spread over several experts. Some are negative where the mixture is purer than the
    components. Weights below 1e-12 are rounding noise and become 0, and a weight that is left
    alone becomes 1, so that with as many components as domains the mixture of one component gives
    exactly that expert. The identity matrix returns the mixture bit for bit.

    Args:
        mixture: ``(D,)``.
        matrix: ``(K, D)``, accepted by
            :func:`megatron_mergemix.mixtures.components.check_components`.

    Returns:
        ``(K,)``, summing to 1 as the mixture does.
    """
    mixture = np.asarray(mixture, dtype=np.float64)
    num_components, num_domains = matrix.shape
    if num_components == num_domains and np.array_equal(matrix, np.eye(num_domains)):
        return mixture.copy()
    if num_components == num_domains:
        weights = np.linalg.solve(matrix.T, mixture)
    else:
        weights = np.linalg.lstsq(matrix.T, mixture, rcond=None)[0]
    weights[np.abs(weights) < 1e-12] = 0.0
    if np.count_nonzero(weights) == 1:
        weights[weights != 0] = 1.0
    return weights
