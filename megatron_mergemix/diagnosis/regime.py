"""Whether experts are where merging was seen to work: what was studied, and where these are.

How well proxies rank mixtures is known for certain only after reference models were trained
(``mergemix validate``). Before that there is what was observed elsewhere:

- The study (``docs/fidelity.md``, from whose tables the numbers of this module are taken): a
  byte-level GPT, four domains, three seeds, 24 really trained mixtures each, in which every domain
  has a fifth of its uniform share at least; rank correlation (Spearman) of the mean held-out loss.
  It varied what experts share and how far they went. Whether they share anything decides: experts
  of pure domains ranked far worse than all others, however little they were trained.
- Over the whole simplex, one seed, the defaults ranked worse: mixtures that nearly leave a domain
  out forget it in training, and a merge of components that all have some does not.
- DeMix (arXiv 2602.00747) recorded updates (delta) of 3.1, 6.9, 10.1 and 10.5 % for experts of 2,
  10, 30 and 50 billion tokens, with rank correlations of 0.55, 0.60, 0.81 and 0.80.
- The theory of second order (``second_order.py``) says by how much a model that gradient descent
  has trained differs from its proxy. It is shown and decides nothing: in the study its gap, and
  what it misses of the losses, did not tell experts that rank well from others.

So the verdict is ``within``, ``beyond`` or ``open`` (``REGIMES``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from megatron_mergemix.mixtures.simplex import Array

RANKED: Mapping[float, float] = {0.0: 0.50, 0.1: 0.90, 0.25: 0.92, 0.5: 0.91, 0.75: 0.87}
"""General share of the experts -> rank correlation of their merges in the study."""

WELL = 0.85
"""Rank correlation from which on experts count as those that ranked well."""

SHARES = (0.1, 0.75)
"""Least and largest general share that ranked well there."""

UPDATES = (0.011, 0.076)
"""Least and largest delta of experts that ranked well there, of each variant's furthest expert,
rounded outward."""

LARGEST_DISAGREEMENT = 0.1
"""Of Hessian-vector products from two step sizes; chosen by hand, far above rounding in fp32."""

STUDY = (
    "the study of a byte-level GPT (4 domains, 3 seeds, 24 really trained mixtures each, a fifth "
    "of the uniform share of every domain at least)"
)

REGIMES: Mapping[str, str] = {
    "within": "The experts are as those whose merges ranked mixtures well in the study.",
    "beyond": "The experts are as those whose merges ranked mixtures badly in the study.",
    "open": "It is open how well these experts rank mixtures: none like them were studied.",
}
"""Regime -> as a sentence."""


@dataclass(frozen=True)
class Verdict:
    """Where the experts are.

    Attributes:
        regime: one of :data:`REGIMES`.
        reasons: whole sentences, what decides first.
    """

    regime: str
    reasons: list[str]


def verdict(
    *,
    matrix: Array,
    general_share: float | None,
    experts: Sequence[str],
    delta: Sequence[float],
    losses: Mapping[str, Any],
) -> Verdict:
    """Judge what was measured by the limits of this module.

    Args:
        matrix: component matrix ``(K, D)``: what every expert was trained on.
        general_share: of general data in it; None where ``components`` are given instead.
        experts: names.
        delta: update sizes by expert.
        losses: name -> ``disagreements`` by expert, of the curvature that is shown beside this.
    """
    updates = dict(zip(experts, delta, strict=True))
    shared = of_training(matrix, general_share)
    length = _of_length(updates)
    regimes = {shared.regime, length.regime}
    regime = next(each for each in ("beyond", "open", "within") if each in regimes)
    # What decides comes first.
    found = sorted((shared, length), key=lambda each: each.regime != regime)
    reasons = [each.reason for each in found if each.regime != "within" or regime == "within"]
    return Verdict(regime, [*reasons, *_unclear(losses), _caution()])


class Finding(NamedTuple):
    """What the study says of experts by one thing: a regime, and why."""

    regime: str
    reason: str


def of_training(matrix: Array, general_share: float | None) -> Finding:
    """Return what the study says of experts by what they are trained on; see :func:`verdict`."""
    if np.all(matrix.max(axis=1) > 1 - 1e-9):
        return Finding(
            "beyond",
            f"Every expert is of one domain alone. In {STUDY} merges of such experts had a rank "
            f"correlation of {RANKED[0.0]:.2f} with trained models at most, however little they "
            f"were trained; those of experts with a general share of 0.25 had {RANKED[0.25]:.2f}. "
            "Set experts.general_share.",
        )
    if general_share is None:
        return Finding(
            "open",
            f"The experts have mixtures of your own choice (experts.components). In {STUDY} they "
            f"shared general data: {_ranked()}.",
        )
    least, most = SHARES
    if not least <= general_share <= most:
        return Finding(
            "open",
            f"experts.general_share is {general_share:g}, which {STUDY} did not have: it had "
            f"{_ranked()}.",
        )
    return Finding(
        "within",
        f"experts.general_share is {general_share:g}, and merges ranked well from {least:g} to "
        f"{most:g} in {STUDY}: {_ranked()}.",
    )


def _ranked() -> str:
    pairs = [f"{rho:.2f} at {share:g}" for share, rho in RANKED.items()]
    return f"rank correlations of {', '.join(pairs)}"


def _of_length(updates: Mapping[str, float]) -> Finding:
    """Return what the study says of experts by how far they went."""
    least, most = UPDATES
    studied = f"delta was {least:.1%} to {most:.1%} there, of the furthest expert"
    if far := [f"{name} {delta:.1%}" for name, delta in updates.items() if delta > most]:
        return Finding(
            "open",
            f"Experts went further than any that ranked well ({studied}): {', '.join(far)}. Fewer "
            "experts.tokens or a lower experts.lr bring them nearer.",
        )
    furthest = max(updates.values())
    if furthest < least:
        return Finding(
            "open",
            f"Experts went less far than any that ranked well ({studied}): {furthest:.1%} at most. "
            "What a merge changes may be less than the noise of the scores.",
        )
    return Finding(
        "within", f"The experts went as far as those that ranked well: {furthest:.1%} ({studied})."
    )


def _unclear(losses: Mapping[str, Any]) -> Iterator[str]:
    for name, loss in losses.items():
        largest = max(loss["disagreements"])
        if largest > LARGEST_DISAGREEMENT:
            yield (
                f"Curvature of {name} is not measured well: two step sizes disagree by "
                f"{largest:.0%} (limit {LARGEST_DISAGREEMENT:.0%}), so that its predicted gap says "
                "little. Weights in bf16, or MoE tokens that change their experts, do that."
            )


def _caution() -> str:
    return (
        "That study is of a toy, and mixtures that nearly leave a domain out ranked worse there. "
        "Curvature and predicted gap are theory: they did not tell experts that rank well from "
        "others. `mergemix validate` measures what these proxies are worth."
    )
