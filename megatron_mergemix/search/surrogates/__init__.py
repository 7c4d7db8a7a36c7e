"""Surrogates: the regressions from mixture to score. One file and one line here for each."""

from __future__ import annotations

from megatron_mergemix.search.surrogates.gp import GaussianProcess
from megatron_mergemix.search.surrogates.quadratic import Quadratic
from megatron_mergemix.search.surrogates.surrogate import Surrogate

SURROGATES: dict[str, type[Surrogate]] = {
    "gp": GaussianProcess,
    "quadratic": Quadratic,
}
