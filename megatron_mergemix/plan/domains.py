"""The domains of a plan: what they hold, what experts see of them, and their bounds. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_mergemix.config import Config
from megatron_mergemix.experiment.named_files import PrefixCount
from megatron_mergemix.mixtures import simplex
from megatron_mergemix.mixtures.components import Amplification, amplification
from megatron_mergemix.training_runs.mixtures import component_matrix, components, named_mixture

Counts = Mapping[str, Sequence[PrefixCount]]
"""Domain -> what its datasets hold."""

Components = Mapping[str, Mapping[str, float] | None]
"""Expert -> its training mixture; None while it depends on data that were not counted."""


@dataclass(frozen=True)
class DomainPlan:
    """One domain.

    Attributes:
        name: of the domain.
        prefixes: its datasets with what they hold; none where no file was opened.
        documents: in all datasets; None where no file was opened.
        train_tokens: in the training part of ``blend.split``; None where no file was opened.
        proportional: share of all training tokens; None where no file was opened.
        expert_epochs: most passes of one expert over it; None when experts are given, or no file
            was opened.
        low: least share the search may recommend.
        high: largest share, also limited by ``max_epochs``; None where that limit is not known.
    """

    name: str
    prefixes: Sequence[PrefixCount]
    documents: int | None
    train_tokens: int | None
    proportional: float | None
    expert_epochs: float | None
    low: float
    high: float | None


def plan_domains(
    config: Config,
    counts: Counts | None,
    bounds: simplex.Bounds,
    trained_on: Components,
    run_tokens: Mapping[str, int],
) -> list[DomainPlan]:
    """Return one row per domain.

    Args:
        config: the experiment.
        counts: what its files hold; None where none may be opened.
        bounds: least and largest share.
        trained_on: what the experts are trained on.
        run_tokens: training run -> its tokens.
    """
    if counts is None:
        return list(_uncounted(config, bounds))
    return list(_counted(counts, bounds, trained_on, run_tokens))


def tokens_of(counts: Counts) -> dict[str, int]:
    """Return the training tokens of every domain."""
    return {name: sum(count.train_tokens for count in counts[name]) for name in counts}


def components_of(config: Config, counts: Counts | None) -> Components:
    """Return what the experts are trained on."""
    experts = config.experts
    if counts is not None:
        return dict(components(config))
    if experts.general_share and experts.general_mixture == "proportional":
        return dict.fromkeys(config.expert_names)
    if "proportional" in experts.components.values():
        return {
            name: None if row == "proportional" else named_mixture(config, row)
            for name, row in experts.components.items()
        }
    return dict(components(config))


def amplification_of(
    config: Config, trained_on: Components, bounds: simplex.Bounds
) -> Amplification | None:
    """Return how much noise of the experts enters the search; None where that is not known."""
    if any(row is None for row in trained_on.values()):
        return None
    return amplification(component_matrix(config), list(config.domains), bounds)


def _uncounted(config: Config, bounds: simplex.Bounds) -> Iterator[DomainPlan]:
    for (name, domain), low, high in zip(
        config.domains.items(), bounds.low, bounds.high, strict=True
    ):
        largest = float(high) if domain.max_epochs is None else None
        yield DomainPlan(name, (), None, None, None, None, float(low), largest)


def _counted(
    counts: Counts,
    bounds: simplex.Bounds,
    trained_on: Components,
    run_tokens: Mapping[str, int],
) -> Iterator[DomainPlan]:
    tokens = tokens_of(counts)
    for name, low, high in zip(counts, bounds.low, bounds.high, strict=True):
        seen = [
            row[name] * run_tokens[f"experts/{expert}"]
            for expert, row in trained_on.items()
            if row is not None and f"experts/{expert}" in run_tokens
        ]
        yield DomainPlan(
            name=name,
            prefixes=counts[name],
            documents=sum(count.documents for count in counts[name]),
            train_tokens=tokens[name],
            proportional=tokens[name] / sum(tokens.values()),
            expert_epochs=max(seen) / tokens[name] if seen else None,
            low=float(low),
            high=float(high),
        )
