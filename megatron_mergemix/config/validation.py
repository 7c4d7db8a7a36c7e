"""The section ``validation`` of ``mix.yaml``, and the references that it adds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from megatron_mergemix.config.groups import bounded_levels
from megatron_mergemix.config.problems import Problem, suggestion
from megatron_mergemix.config.section import Section
from megatron_mergemix.mixtures.simplex import mixture_bounds, to_mixture, to_vector
from megatron_mergemix.mixtures.space_filling import filling_mixtures

if TYPE_CHECKING:
    from megatron_mergemix.config import Config

ALWAYS: tuple[Literal["learned", "uniform", "proportional"], ...] = (
    "learned",
    "uniform",
    "proportional",
)
"""Mixtures that space-filling references are compared with, whatever ``references`` names."""

LEAST_RANKED = 4
"""Mixtures below which a rank correlation says nothing: three agree by chance one time in six."""

FILLING = re.compile(r"filling-\d{2,}")
"""Names of space-filling references; ``with_fillings`` gives them to no other mixture."""

SAME = 1e-6
"""Shares that agree to this are the same: another machine may round the last bits differently."""


class Validation(Section):
    """What ``mergemix validate`` trains beside the ``references`` that have names."""

    space_filling: Annotated[int, Field(ge=0)] = 0
    """How many more mixtures are really trained, ``filling-01`` and so on: spread over what
    ``domains.*.bounds`` and ``search.min_share`` allow, away from pure domains, the uniform mixture
    and each other, so that they tell how well merges rank mixtures anywhere; 24 tell it well. Then
    learned, uniform and proportional are trained always. 0 trains ``references`` alone, since each
    costs as much as an expert: whether the learned mixture is ahead of the others, no ranks."""
    leave_out: list[str] = []
    """Which of ``filling-01`` and so on, learned, uniform and proportional are no references after
    all, such as one whose training diverges. The others stay as they are, and the result says so.
    """
    seed: int = 0
    """Of the space-filling mixtures, and of the bootstrap behind the intervals."""


def too_few_to_rank(config: Config) -> str | None:
    """Return a sentence for before references are trained, where they will tell no ranks."""
    count = len(config.references)
    if count >= LEAST_RANKED:
        return None
    return (
        f"{count} references tell which of them is best when really trained, not how well merges "
        f"rank mixtures, which takes {LEAST_RANKED} at least: --set validation.space_filling=24 "
        "trains 24 more."
    )


def how_to_leave_out(config: Config, names: Sequence[str]) -> str:
    """Return what to write so that references that keep failing hold up the others no more."""
    ours = {*ALWAYS, *_filling_names(config.validation.space_filling)}
    left = [*config.validation.leave_out, *(name for name in names if name in ours)]
    named = [name for name in names if name not in ours]
    ways = [f"set validation.leave_out=[{', '.join(left)}]"] if len(named) < len(names) else []
    ways += [f"remove {', '.join(named)} from references"] if named else []
    return f"{' and '.join(ways)}: nothing else that is trained or scored is done again"


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
    problems = _unknown_left_out(config)
    left_out = set(config.validation.leave_out)
    references = {n: mixture for n, mixture in config.references.items() if n not in left_out}
    if num == 0:
        return config.model_copy(update={"references": references}), problems
    for known in [name for name in ALWAYS if name not in left_out]:
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
    names = _filling_names(num)
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
    wanted = zip(names, points, strict=False)
    for name, point in ((n, point) for n, point in wanted if n not in left_out):
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


def _filling_names(num: int) -> list[str]:
    return [f"filling-{number:02d}" for number in range(1, num + 1)]


def _unknown_left_out(config: Config) -> list[Problem]:
    """Return a problem for every name in ``leave_out`` that could be no reference anyway."""
    known = [*ALWAYS, *_filling_names(config.validation.space_filling)]
    problems = []
    for place, name in enumerate(config.validation.leave_out):
        if name not in known:
            named = (
                " It is one of references: remove it there." if name in config.references else ""
            )
            problems.append(
                Problem(
                    ("validation", "leave_out", place),
                    f"is {name!r}, expected learned, uniform, proportional or one of "
                    f"validation.space_filling.{named or suggestion(name, known)}",
                )
            )
    return problems
