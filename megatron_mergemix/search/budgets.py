"""Which stages a search has and how many models each of them scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megatron_mergemix.config import Config

CANDIDATES = 2
"""Of every search, verified by real merges: the argmax and the mean of the best."""


class StageBudget(NamedTuple):
    """One stage.

    Attributes:
        name: of the stage; empty where the search has one alone.
        variables: what it mixes.
        models: most models it scores: base, trials and candidates. Less where bounds leave a
            group no room, or where an earlier stage has measured the same mixture.
    """

    name: str
    variables: Sequence[str]
    models: int


def stage_budgets(config: Config) -> list[StageBudget]:
    """Return the stages of the search in their order, see ``search/hierarchical.py``."""
    settings, domains = config.search, list(config.domains)
    if settings.hierarchy is None:
        return [StageBudget("", domains, 1 + settings.cost_in_trials(len(domains)) + CANDIDATES)]
    groups = config.leaves_by_group()
    coarse = StageBudget("coarse", list(groups), settings.trials + CANDIDATES)
    fine = [
        StageBudget(name, leaves, settings.trials_in_group(name) + CANDIDATES)
        for name, leaves in groups.items()
        if len(leaves) > 1
    ]
    if settings.hierarchy == "top_down":
        # What is composed was measured by then, but neither the priors nor the joint optimum.
        coarse = coarse._replace(models=coarse.models + 1)
        return [coarse, *fine, StageBudget("composed", domains, 3)]
    leaves = StageBudget("leaves", domains, 1 + len(domains) + 2)
    return [leaves, *fine, coarse, StageBudget("composed", domains, 1)]
