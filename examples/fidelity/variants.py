"""What the study varies: which experts, how they are merged, and which part of the study asks."""

from __future__ import annotations

import math
from dataclasses import dataclass

TOKENS = 0.4e6
"""Of every expert and reference model, unless a variant says otherwise."""
LR = 1e-3
BASE_TOKENS = 6e6
"""Of the base, at the same learning rate: experts start from a model that knows all domains."""
SHARE = 0.25
"""``experts.general_share``, the default of the package."""

TOKENS_PER_STEP = 32 * 128

LEARNING_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)
TOKEN_FACTORS = (0.25, 0.5, 1.0)
LONGEST = 2.0
"""A factor of tokens beside the grid, at the learning rate of the defaults."""
SHARES = (0.0, 0.1, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Variant:
    """One way to make the experts.

    Attributes:
        name: of its folder and of its row in the tables.
        tokens: of each expert.
        lr: constant, of each expert.
        share: of general data in each expert.
    """

    name: str
    tokens: float = TOKENS
    lr: float = LR
    share: float = SHARE

    def settings(self) -> list[str]:
        """Return the settings that make it."""
        return [*budget(self.tokens, self.lr), f"experts.general_share={self.share:g}"]


def budget(tokens: float, lr: float = LR) -> list[str]:
    """Return the settings of a run's budget, with seven saves; the last three are averaged."""
    interval = max(1, math.ceil(tokens / TOKENS_PER_STEP) // 7)
    saving = f"training.save_interval={interval}"
    return [f"experts.tokens={tokens:g}", f"experts.lr={lr:g}", saving]


def variant_of(share: float = SHARE, lr: float = LR, factor: float = 1.0) -> Variant:
    """Return the variant, named by what is not as in the defaults."""
    names = [f"share-{share:g}"] if share != SHARE else []
    names += [f"lr-{lr:g}"] if lr != LR else []
    names += [f"tokens-{factor:g}x"] if factor != 1.0 else []
    return Variant("-".join(names) or "default", tokens=factor * TOKENS, lr=lr, share=share)


DEFAULT = variant_of()
PAPER = variant_of(share=0.0)
"""One pure expert per domain, as in the paper."""


def every_variant() -> list[Variant]:
    """Return each once, the default first."""
    return list(dict.fromkeys([*by_share(), *by_budget(), *pure_by_budget()]))


def by_share() -> list[Variant]:
    """Return the default recipe with every share of general data, the default first."""
    return [DEFAULT, *(variant_of(share=share) for share in SHARES if share != SHARE)]


def by_budget() -> list[Variant]:
    """Return the default share at every learning rate and number of tokens, the default first."""
    budgets = [(lr, factor) for factor in TOKEN_FACTORS for lr in LEARNING_RATES]
    budgets.remove((LR, 1.0))
    return [DEFAULT, *(variant_of(lr=lr, factor=x) for lr, x in [*budgets, (LR, LONGEST)])]


def pure_by_budget() -> list[Variant]:
    """Return pure experts that go less far than those of the paper's setting, which come first."""
    lower = [variant_of(share=0.0, lr=lr) for lr in LEARNING_RATES if lr < LR]
    return [PAPER, *lower, variant_of(share=0.0, factor=min(TOKEN_FACTORS))]
