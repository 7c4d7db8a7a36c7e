"""What the standard errors of the scores say about how much each row weighs."""

from __future__ import annotations

import numpy as np

from megatron_mergemix.mixtures.simplex import Array


def usable_errors(stderrs: Array | None) -> Array | None:
    """Return the standard errors with far too small ones lifted, or None where they say nothing.

    One far below the others (an accuracy of exactly 0 or 1 has none) is lifted to a quarter of
    their median, so that no trial is taken for exact.
    """
    if stderrs is None or not np.isfinite(stderrs).all() or np.median(stderrs) <= 0:
        return None
    return np.asarray(np.maximum(stderrs, np.median(stderrs) / 4))


def row_weights(stderrs: Array | None, num_rows: int) -> Array:
    """Return what to multiply rows of a least-squares fit by ``(N,)``; about 1."""
    errors = usable_errors(stderrs)
    return np.ones(num_rows) if errors is None else np.asarray(np.median(errors) / errors)


def noise_variance(stderrs: Array | None) -> Array | float:
    """Return the variance of each row's noise; 0 where unknown, so that misfit is not excused."""
    errors = usable_errors(stderrs)
    return 0.0 if errors is None else np.asarray(errors**2)
