"""Gaussian process on the cube roots of the shares, for scores that are steep near share 0.

The first per cents of a domain teach most of what a trained model learns from it: its loss there
falls like a small power of the share, which no kernel on the shares themselves can follow, while
merged models are smooth there. On the runs of RegMix (arXiv 2407.01492) the cube root ranks unseen
mixtures better than the square root, the fourth root and the logarithm of a share plus a constant.
"""

from __future__ import annotations

from typing import ClassVar

from megatron_mergemix.search.surrogates.gp import GaussianProcess


class RootGaussianProcess(GaussianProcess):
    """See the module and :class:`~megatron_mergemix.search.surrogates.gp.GaussianProcess`."""

    name: ClassVar[str] = "gp_root"
    power: ClassVar[float] = 1 / 3
