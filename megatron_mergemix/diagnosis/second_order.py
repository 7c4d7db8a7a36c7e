"""The second-order theory of merging: what a merge misses of a model that is really trained.

MergeMix (arXiv 2601.17858), section 3.3 and appendix B. Loss ``L_k`` of what expert k was trained
on has the gradient ``g_k`` and the Hessian ``H_k`` at the base. After T steps of rate eta, to
second order in ``eta T``,

    trained on the mixture:  -eta T sum_k a_k g_k + (eta T)^2 / 2 sum_kj a_k a_j H_k g_j
    merged:                  -eta T sum_k a_k g_k + (eta T)^2 / 2 sum_k a_k H_k g_k

(the main text has a minus in an expert's second term; the appendix, and what follows, the right
plus). They agree to first order, and their difference ``Delta`` changes the loss of domain c by
``<g_c, Delta>``. This is the gap, in nats per token.

What the paper leaves open, and what is done here:

- Gradients are replaced by what training made of them: ``eta T g_k = -tau_k`` to first order, with
  ``tau_k`` expert minus base. Then neither eta nor T is needed, and Adam is allowed for: where all
  runs precondition their steps alike, by a symmetric ``P``, the task vector is ``-eta T P g_k``,
  the difference ``P H_k P g_j``, and ``<g_c, P H_k P g_j> (eta T)^2 = tau_c^T H_k tau_j`` still.
- So ``gap_c = 1/2 [sum_kj a_k a_j tau_c^T H_k tau_j - sum_k a_k tau_c^T H_k tau_k]``, which is the
  loss of the trained model minus that of the merge. It is 0 at every expert.
- Experts may be trained on components, rows of ``M`` over domains: ``L_k = sum_d M_kd L_d``. A
  mixture lambda is merged with ``alpha M = lambda`` and trained with ``sum_d lambda_d L_d = sum_k
  alpha_k L_k``, so that the same holds with alpha for a. Domain c alone stands for the merge
  weights of its corner, and so does ``tau_c``.
- Only differences of the gap between mixtures change how mixtures are ranked (the paper observes a
  constant offset), so what is compared with the spread of the losses is the spread of the gap.

A large predicted gap is a warning; a small one is no promise. The tests hold the formula for
gradient descent, preconditioned or not. Adam from fresh states is neither: it divides every run's
gradient by a size of its own. Tried once, on the tiny experiment of the tests (ten steps of Adam
at 2e-3, delta 10 %): three models really trained on mixtures differed from their proxies by 0.11
nats per token (root mean square, three losses), where 0.004 was predicted. The losses of the
proxies themselves were predicted to 0.015.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mergemix.mixtures import simplex
from megatron_mergemix.mixtures.levels import Levels
from megatron_mergemix.mixtures.merge_weights import merge_weights
from megatron_mergemix.mixtures.simplex import Array, Bounds
from megatron_mergemix.search.surrogates.choose import spearman

NUM_POINTS = 2000
"""Mixtures drawn evenly within the bounds, over which a gap is compared with a loss."""


@dataclass(frozen=True)
class Expansion:
    """A loss at the base along K task vectors, in nats per token.

    Attributes:
        loss: at the base.
        first_order: ``<gradient, tau_k>``, ``[K]``.
        second_order: ``tau_k^T H tau_l``, symmetric, ``[K, K]``.
    """

    loss: float
    first_order: Array
    second_order: Array

    def at(self, alpha: Array) -> Array:
        """Return the loss at merge weights ``(..., K)``, to second order."""
        bent = np.einsum("...k,kl,...l->...", alpha, self.second_order, alpha)
        return np.asarray(self.loss + alpha @ self.first_order + bent / 2)


def expansion_error(expansion: Expansion, alpha: Array, measured: Array) -> float:
    """Return how well the second order explains measured losses: 0 exactly, 1 no better than none.

    Args:
        expansion: of this loss.
        alpha: merge weights ``(N, K)``.
        measured: losses of these merges ``(N,)``.

    Returns:
        The root mean square of what it misses, over that of what there is to explain: the change
        from the base.
    """
    missed, change = expansion.at(alpha) - measured, measured - expansion.loss
    size = float(np.linalg.norm(change))
    return float(np.linalg.norm(missed)) / size if size > 0 else 0.0


def relative_curvatures(lengths: Array, norms: Array, own: int) -> Array | None:
    """Return gamma ``[K]``: how much a loss bends along other task vectors, relative to its own.

    ``gamma_j = (|H tau_j| / |tau_j|) / (|H tau_own| / |tau_own|)``: equation of section 3.3 with
    task vectors in place of gradients, of which only the direction matters. Small beside the own 1
    means little interference. None where the loss does not bend along its own.

    Args:
        lengths: ``|H tau_j|``, ``[K]``.
        norms: ``|tau_j|``, ``[K]``.
        own: the expert that is trained on this loss.
    """
    bends = np.divide(lengths, norms, out=np.zeros_like(lengths), where=norms > 0)
    return np.asarray(bends / bends[own]) if bends[own] > 0 else None


@dataclass(frozen=True)
class Gap:
    """The predicted loss of a trained model minus that of its proxy; see the module.

    Attributes:
        interaction: ``tau_c^T H_k tau_j``, ``[K, K]``.
    """

    interaction: Array

    def at(self, alpha: Array) -> Array:
        """Return the gap at merge weights ``(..., K)``, in nats per token."""
        mixed = np.einsum("...k,kj,...j->...", alpha, self.interaction, alpha)
        return np.asarray((mixed - alpha @ np.diagonal(self.interaction)) / 2)


def gaps(second_orders: Sequence[Array], matrix: Array) -> list[Gap]:
    """Return the gap of every domain's loss.

    Args:
        second_orders: of the loss of domain d, ``[K, K]`` each, in the order of the domains.
        matrix: components ``(K, D)``.
    """
    of_domains = np.stack(second_orders)
    of_experts = np.einsum("kd,dlj->klj", matrix, of_domains)
    corners = [merge_weights(row, matrix) for row in np.eye(matrix.shape[1])]
    return [Gap(np.einsum("l,klj->kj", corner, of_experts)) for corner in corners]


@dataclass(frozen=True)
class Comparison:
    """A gap beside the loss that it is missing from, over all allowed mixtures.

    Attributes:
        largest: of the gap, by size, in nats per token.
        spread_ratio: standard deviation of the gap over that of the merges' losses.
        rank_correlation: Spearman's, of the losses of merges and of trained models as predicted.
    """

    largest: float
    spread_ratio: float
    rank_correlation: float


def compare(losses: Array, gap: Array) -> Comparison:
    """Return how a gap ``(N,)`` relates to the losses of the same merges ``(N,)``."""
    spread = float(losses.std())
    return Comparison(
        largest=float(gap[np.argmax(np.abs(gap))]),
        spread_ratio=float(gap.std()) / spread if spread > 0 else 0.0,
        rank_correlation=spearman(losses, losses + gap),
    )


def points_of(bounds: Bounds, matrix: Array, levels: Levels | None = None) -> Array:
    """Return merge weights ``(NUM_POINTS, K)`` of mixtures spread within all bounds."""
    mixtures = simplex.sample_uniform(bounds, NUM_POINTS, np.random.default_rng(0))
    if levels is not None:
        mixtures = levels.project(mixtures)
    return np.stack([merge_weights(mixture, matrix) for mixture in mixtures])
