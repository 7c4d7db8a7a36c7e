"""The section ``validation`` of ``mix.yaml``, and the references that it adds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from megatron_mergemix.config.groups import bounded_levels
from megatron_mergemix.config.problems import Problem
from megatron_mergemix.config.section import Section
from megatron_mergemix.simplex import mixture_bounds, to_mixture, to_vector
from megatron_mergemix.space_filling import filling_mixtures

if TYPE_CHECKING:
    from megatron_mergemix.config import Config

ALWAYS: tuple[Literal["learned", "uniform", "proportional"], ...] = (
    "learned",
    "uniform",
    "proportional",
)
"""Mixtures that space-filling references are compared with, whatever ``references`` names."""

FILLING = re.compile(r"filling-\d{2,}")
"""Names of space-filling references; ``with_fillings`` gives them to no other mixture."""

SAME = 1e-6
"""Shares that agree to this are the same: another machine may round the last bits differently."""


class Validation(Section):
    """What ``mergemix validate`` trains beside the ``references`` that have names."""

    space_filling: Annotated[int, Field(ge=0)] = 0
    """How many more mixtures are really trained, ``filling-01`` and so on: spread over what
    ``domains.*.bounds`` and ``search.min_share`` allow, away from pure domains, the uniform mixture
    and each other, so that they tell how well merges rank mixtures anywhere. Then learned, uniform
    and proportional are trained always."""
    seed: int = 0
    """Of the space-filling mixtures, and of the bootstrap behind the intervals."""


def is_filling(name: str) -> bool:
    """Return whether a reference was added to fill the space, so that its name says nothing."""
    return FILLING.fullmatch(name) is not None


def with_fillings(config: Config) -> tuple[Config, list[Problem]]:
    """Return the experiment with all its references, and what is wrong with them.

    Adding is idempotent: what was written down for a job has its space-filling references already,
    and keeps them to the last bit. They depend on domains, bounds and the section alone: another
    named reference, or more of them, leaves those that are trained already as they are.
    """
    num, seed = config.validation.space_filling, config.validation.seed
    if num == 0:
        return config, []
    problems = []
    references = dict(config.references)
    for known in ALWAYS:
        if known not in references.values():
            if known in references:
                problems.append(
                    Problem(
                        ("references", known),
                        f"is another mixture, but validation.space_filling trains {known} as well; "
                        "give it another name",
                    )
                )
            references[known] = known
    names = [f"filling-{number:02d}" for number in range(1, num + 1)]
    domains = list(config.domains)
    bounds = mixture_bounds(config.domains, {}, floor=config.search.min_share)
    points = filling_mixtures(bounds, num, seed, bounded_levels(config, bounds))
    if len(points) < num:
        problems.append(
            Problem(
                ("validation", "space_filling"),
                f"is {num}, but domains.*.bounds leave room for {len(points)} other mixtures; "
                "widen them",
            )
        )
    for name, point in zip(names, points, strict=False):
        given = references.setdefault(name, to_mixture(point, domains))
        is_ours = isinstance(given, Mapping) and (
            np.max(np.abs(to_vector(given, domains) - point)) <= SAME
        )
        if not is_ours:
            problems.append(
                Problem(
                    ("references", name),
                    f"is a name that validation.space_filling: {num} with validation.seed: {seed} "
                    "gives to another mixture; choose another name",
                )
            )
    return config.model_copy(update={"references": references}), problems
