"""Whether experts are where merging was seen to work: the limits, and where they come from.

How well proxies rank mixtures is known for certain only after reference models were trained
(``mergemix validate``). Before that there is what was observed elsewhere, and a theory:

- The study (``docs/fidelity.md``): a byte-level GPT, four domains, three seeds, 24 really trained
  mixtures each, in which every domain has a fifth of its uniform share at least; rank correlation
  (Spearman) of the mean held-out loss at a learning rate of 1e-3. Components with a general share
  of 0.25, affine weights and the mean of the last saves: 0.91, beside 0.93 between two trainings of
  the same mixtures; 0.90 and 0.89 at shares of 0.1 and 0.5, 0.82 at 0.75. Experts of pure domains:
  0.52. Over the whole simplex, one seed: 0.78 and 0.70. Seven domains, one seed: 0.95. Against
  models five times as large: 0.74 (0.48 to 0.95 by seed), where small trained models have 0.72.
- Trials before it, one seed each, over the whole simplex and with last saves alone: 0.66 to 0.71
  for such components at 2.5e-4 to 1e-3, 0.64 to 0.74 for pure domains. What ranked badly were
  mixtures that nearly leave a domain out: training forgets it, a merge of components that all have
  some does not. Neither recorded update sizes or curvature, so none of the limits below is fitted
  to them.
- DeMix (arXiv 2602.00747) recorded update sizes (delta) of 3.1, 6.9, 10.1 and 10.5 % for experts
  of 2, 10, 30 and 50 billion tokens, with rank correlations of 0.55, 0.60, 0.81 and 0.80: short
  experts were not better, and nothing is known beyond the last.
- The theory of second order (``second_order.py``) says by how much a model that gradient descent
  has trained differs from its proxy. With Adam the real gap may be larger by far: see there.

So the verdict is ``within``, ``beyond`` or ``open``; the first means that no limit that is known
is broken, and nothing more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LARGEST_UPDATE = 0.105
"""Of delta: the largest that DeMix saw ranked well; see the module."""

LARGEST_GAP = 0.5
"""Of the spread of the gap over that of the losses. An independent gap of half the spread leaves
a correlation of ``1 / sqrt(1 + 0.5^2) = 0.89`` between proxies and trained models, about the
fidelity that the paper reports (0.92)."""

LARGEST_ERROR = 0.5
"""Of what the second order misses of measured changes of a loss: a quarter of their variance.
Chosen by hand; beyond it the predicted gap is a prediction of something else."""

LARGEST_DISAGREEMENT = 0.1
"""Of Hessian-vector products from two step sizes; chosen by hand, far above rounding in fp32."""

STUDY = (
    "the study of a byte-level GPT (4 domains, 3 seeds, 24 really trained mixtures each, a fifth "
    "of the uniform share of every domain at least)"
)


@dataclass(frozen=True)
class Verdict:
    """Where the experts are.

    Attributes:
        regime: ``within`` all known limits, ``beyond`` one of them, or ``open``: not measured well
            enough to tell.
        reasons: whole sentences, what breaks a limit first.
    """

    regime: str
    reasons: list[str]


def verdict(
    *,
    is_pure: bool,
    general_share: float | None,
    experts: Sequence[str],
    delta: Sequence[float],
    losses: Mapping[str, Any],
) -> Verdict:
    """Judge what was measured by the limits of this module.

    Args:
        is_pure: whether every expert was trained on one domain alone.
        general_share: of general data in every expert's training; None where ``components`` are
            given instead.
        experts: names.
        delta: update sizes by expert.
        losses: name -> ``expansion_error``, ``disagreements`` by expert, and ``gap``, None or with
            its ``spread_ratio``.
    """
    unclear = list(_unclear(losses))
    broken = [*_of_pure_domains(is_pure), *_too_far(experts, delta), *_bent(losses)]
    regime = "beyond" if broken else "open" if unclear else "within"
    kept = [] if broken or unclear else [_all_kept(delta, losses)]
    study = [] if is_pure else [_study(general_share)]
    return Verdict(regime, [*broken, *unclear, *kept, *study, _caution()])


def _of_pure_domains(is_pure: bool) -> Iterator[str]:
    if is_pure:
        yield (
            f"These experts are of pure domains. In {STUDY} such proxies had a rank correlation of "
            "0.52, those of components with a general share of 0.25 had 0.91. Set "
            "experts.general_share."
        )


def _too_far(experts: Sequence[str], delta: Sequence[float]) -> Iterator[str]:
    far = [f"{n} {d:.1%}" for n, d in zip(experts, delta, strict=True) if d > LARGEST_UPDATE]
    if far:
        yield (
            f"Updates are larger than any that was studied (delta up to {LARGEST_UPDATE:.1%}): "
            f"{', '.join(far)}. Use fewer experts.tokens or a lower experts.lr."
        )


def _bent(losses: Mapping[str, Any]) -> Iterator[str]:
    for name, loss in losses.items():
        if loss["expansion_error"] > LARGEST_ERROR:
            yield (
                f"The loss of {name} is not quadratic as far as the experts went: the second order "
                f"at the base misses {loss['expansion_error']:.0%} of its changes (limit "
                f"{LARGEST_ERROR:.0%}), so that its predicted gap says little."
            )
        gap = loss["gap"]
        if gap is not None and gap["spread_ratio"] > LARGEST_GAP:
            yield (
                f"The predicted gap of {name} between trained and merged models varies by "
                f"{gap['spread_ratio']:.0%} of what the loss itself does (limit "
                f"{LARGEST_GAP:.0%})."
            )


def _unclear(losses: Mapping[str, Any]) -> Iterator[str]:
    if not any(loss["gap"] for loss in losses.values()):
        yield "No gap between trained and merged models could be predicted."
    for name, loss in losses.items():
        largest = max(loss["disagreements"])
        if largest > LARGEST_DISAGREEMENT:
            yield (
                f"Curvature of {name} is not measured well: two step sizes disagree by "
                f"{largest:.0%} (limit {LARGEST_DISAGREEMENT:.0%}). Weights in bf16, or MoE tokens "
                "that change their experts, do that."
            )


def _all_kept(delta: Sequence[float], losses: Mapping[str, Any]) -> str:
    gap = max(loss["gap"]["spread_ratio"] for loss in losses.values() if loss["gap"] is not None)
    error = max(loss["expansion_error"] for loss in losses.values())
    return (
        f"No known limit is broken: delta is {max(delta):.1%} at most (limit "
        f"{LARGEST_UPDATE:.1%}), the gap varies by {gap:.0%} of the losses ({LARGEST_GAP:.0%}), "
        f"and the second order misses {error:.0%} of their changes ({LARGEST_ERROR:.0%})."
    )


def _study(general_share: float | None) -> str:
    seen = (
        f"In {STUDY} proxies of components with a general share of 0.25 had a rank correlation of "
        "0.91, those of pure domains 0.52; in trials before it mixtures that nearly leave a domain "
        "out ranked worst"
    )
    if general_share:
        return f"These experts share general data. {seen}."
    return f"These experts have mixtures of your own choice. {seen}; such experts were not in them."


def _caution() -> str:
    return (
        "Not calibrated beyond that: learning rates were recorded, which do not carry over to "
        "other models. The predicted gap is that of gradient descent, not of Adam: a large one is "
        "a warning, a small one no promise. `mergemix validate` measures what these proxies are "
        "worth."
    )


def is_pure(matrix: np.ndarray) -> bool:
    """Return whether every row of a component matrix ``(K, D)`` is one domain alone."""
    return bool(np.all(matrix.max(axis=1) > 1 - 1e-9))
