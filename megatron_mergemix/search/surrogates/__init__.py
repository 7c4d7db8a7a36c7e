"""Surrogates: the regressions from mixture to score. One file and one line here for each."""

from __future__ import annotations

from megatron_mergemix.search.surrogates.gp import GaussianProcess
from megatron_mergemix.search.surrogates.gp_root import RootGaussianProcess
from megatron_mergemix.search.surrogates.loglinear import LogLinear
from megatron_mergemix.search.surrogates.quadratic import Quadratic
from megatron_mergemix.search.surrogates.surrogate import Surrogate
from megatron_mergemix.search.surrogates.trees import SmallTrees

SURROGATES: dict[str, type[Surrogate]] = {
    "gp": GaussianProcess,
    "gp_root": RootGaussianProcess,
    "quadratic": Quadratic,
    "loglinear": LogLinear,
    "lightgbm": SmallTrees,
}
