"""The testbed: its models and domains, its reference mixtures, and where every step works."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from variants import BASE_TOKENS, LR, Variant

from megatron_mergemix.mixtures.simplex import Bounds, to_mixture
from megatron_mergemix.mixtures.space_filling import filling_mixtures

HERE = Path(__file__).parent

FILLING = 22
"""References of a seed beside uniform and proportional. Every seed has its own: those of the next
seed go where the ones before have left room, so that all of them are different mixtures."""
FILLING_FEWER = 18
"""The same for one seed alone, and for the large model; the first ones are the same mixtures."""
LEAST_SHARE = 0.2
"""Of the uniform share, in the references that fill the inside of the simplex. Chosen after one
seed over the whole simplex had ranked at 0.64 to 0.74; the part ``faces`` keeps that in view."""
DOMAINS = {
    4: ("code", "prose", "science", "math"),
    7: ("code", "headers", "prose", "readmes", "science", "math", "tables"),
}

LARGE = ("model.num_layers=4", "model.hidden_size=128")
"""A model of 0.83 million parameters, 4.8 times the other one."""


@dataclass(frozen=True)
class Study:
    """Where the study works, and how much of it is done.

    Attributes:
        out: folder of everything.
        quick: a few steps of training each, to try the machinery; no finding comes of it.
    """

    out: Path
    quick: bool = False

    def config(self, domains: int) -> Path:
        """Return the experiment on four or seven domains."""
        return HERE / ("mix.yaml" if domains == 4 else "mix7.yaml")

    def about(self, domains: int, settings: Sequence[str]) -> tuple[str, ...]:
        """Return what the result of these settings depends on: they, and the file they override."""
        return (self.config(domains).read_text(encoding="utf-8"), *settings)

    def folder(self, seed: int, name: str, domains: int = 4) -> Path:
        """Return the folder of a step."""
        return self.out / f"domains-{domains}" / f"seed-{seed}" / name

    def size(self) -> list[str]:
        """Return the settings of the base, and those that make a quick study quick."""
        if self.quick:
            return ["base.train.tokens=100e3", "search.trials=14"]
        return [f"base.train.tokens={BASE_TOKENS:g}", f"base.train.lr={LR:g}"]

    def filling(self, num: int) -> int:
        """Return how many references fill space where a whole study has ``num``."""
        return min(num, 6) if self.quick else num

    def references(
        self,
        domains: int,
        filling: int,
        *,
        after: int = 0,
        candidates: int = 0,
        least: float = LEAST_SHARE,
    ) -> str:
        """Return the setting of the reference mixtures: two with names, others that fill space.

        Args:
            domains: 4 or 7.
            filling: how many fill space.
            after: how many have done so before, and are left out.
            candidates: seed of the mixtures among which they are looked for.
            least: their least share of every domain, as a part of the uniform one.
        """
        names = DOMAINS[domains]
        region = Bounds(np.full(domains, least / domains), np.ones(domains))
        found: dict[str, Any] = {"uniform": "uniform", "proportional": "proportional"}
        points = filling_mixtures(region, after + filling, candidates)[after:]
        for number, point in enumerate(points, 1):
            found[f"filling-{number:02d}"] = to_mixture(point, names)
        return f"references={json.dumps(found)}"

    def filled_before(self, seed: int) -> int:
        """Return how many references fill space for the seeds before this one (seeds count from
        1)."""
        return self.filling(FILLING) * (seed - 1)

    def tokens(self, tokens: float) -> float:
        """Return the tokens of a training run."""
        return tokens / 20 if self.quick else tokens

    def expert_settings(self, seed: int, variant: Variant) -> list[str]:
        """Return the settings of a variant; its experts see the data in an order of their own."""
        asked = replace(variant, tokens=self.tokens(variant.tokens))
        return [*self.size(), *asked.settings(), f"experts.seed={seed + 2000}"]
