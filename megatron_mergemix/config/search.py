"""The section ``search`` of ``mix.yaml``, and its rules."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from megatron_mergemix.config.mixtures import mixture_problems
from megatron_mergemix.config.problems import Problem
from megatron_mergemix.config.section import Positive, Section, Share

if TYPE_CHECKING:
    from megatron_mergemix.config import Config


OWNERS = {
    "rounds": ("iterative",),
    "batch": ("bayesian", "optuna"),
    "points": ("fixed",),
    "sampler": ("optuna",),
    "steps": ("gradient",),
    "minibatch": ("gradient",),
    "step_length": ("gradient",),
    "top_k": ("mergemix", "iterative", "bayesian", "grid", "fixed", "optuna"),
}
"""Setting -> the strategies that read it; for all others it would have no effect."""

WITHOUT_TRIALS = {"fixed": "points", "gradient": "steps"}
"""Strategy -> what it measures instead of ``trials``."""

GROUP_TRIALS = 24
"""Enough for the design and a fit over the handful of domains that a group has."""


class Search(Section):
    """How the simplex of mixtures is searched."""

    strategy: Literal[
        "mergemix", "iterative", "bayesian", "gradient", "grid", "fixed", "optuna"
    ] = "mergemix"
    """``mergemix``: one design, one fit, a verified optimum (arXiv 2601.17858). ``iterative``:
    rounds, each sampled from what the trials before it predict to be best (CLIMB, arXiv
    2504.13161; DeMix, arXiv 2602.00747). ``bayesian``: a few spread mixtures, then the most
    promising ones in small batches. ``gradient``: mirror descent along the derivative of held-out
    losses through the merge. ``grid``: the finest lattice within ``trials``. ``fixed``: ``points``.
    ``optuna``: a sampler of Optuna (``pip install megatron-mergemix[optuna]``). All measure every
    domain alone and the uniform and proportional mixture first, and verify their optimum by real
    merges. The default needs no result of one candidate to choose the next, and has little regret
    with few noisy trials; docs/search.md has the numbers of all."""
    trials: Positive = 40
    """Merged models that are scored before the optimum is chosen (paper: 40). ``grid`` may need
    fewer; ``fixed`` measures its points, however many, and ``gradient`` takes ``steps``."""
    rounds: list[Positive] = []
    """``iterative``: trials of every round, summing to ``trials``. Empty: 4 to 2 to 1."""
    batch: Positive = 4
    """``bayesian``, ``optuna``: how many mixtures are chosen at a time. They can be measured at
    the same time, but do not learn from each other."""
    points: list[dict[str, float]] = []
    """``fixed``: the mixtures to measure, shares by domain."""
    steps: Positive = 16
    """``gradient``: how often the mixture is moved."""
    minibatch: Annotated[float, Field(gt=0.0, le=1.0)] = 0.25
    """``gradient``: part of every capability's held-out windows that a step is measured on; all
    are seen before one is seen again. A step costs about three forward passes over them."""
    step_length: Annotated[float, Field(gt=0.0)] = 0.3
    """``gradient``: how far the first step goes, as what it changes the logarithms of the shares
    by on average. Later ones are shorter where gradients do not vanish by themselves."""
    sampler: Literal["tpe", "gp", "random"] = "tpe"
    """``optuna``: which sampler proposes."""
    surrogate: Literal["auto", "gp", "gp_root", "quadratic", "loglinear", "lightgbm"] = "auto"
    """Regression mixture -> score that proposes the optimum. ``gp``: a Gaussian process on the
    shares. ``gp_root``: on their cube roots, for scores that are steep near share 0, as losses of
    trained models. ``quadratic``: Scheffe's, from 1.5 trials per coefficient on. ``loglinear``: the
    law of Olmix; its optimum is always a corner. ``lightgbm``: RegMix's trees, with small leaves
    (``pip install megatron-mergemix[lightgbm]``). ``auto``: per capability ``gp``, unless another
    but ``lightgbm`` predicts left-out trials clearly better. The measured candidates are judged by
    ``auto`` always."""
    top_k: Positive = 512
    """The second candidate for the optimum is the mean of the k best of 20,000 predicted mixtures.
    Others take 128 (RegMix, DeMix); 512 had no more regret on ``tools/bench_strategies.py``, and
    less with few trials."""
    min_share: Share = 0.0
    """No mixture has a share between 0 and this: smaller ones become 0 and the others grow."""
    prior: Literal["uniform", "proportional"] | dict[str, float] = "proportional"
    """A mixture that is trusted, by name or as shares by domain; used with ``kl``."""
    kl: Annotated[float, Field(ge=0.0)] = 0.0
    """What leaving the prior costs: ``kl`` times KL(mixture || prior) is taken off the utility
    wherever mixtures are compared."""
    hierarchy: Literal["top_down", "bottom_up"] | None = None
    """Search groups of domains level by level; needs domains with ``children``. ``top_down``: the
    shares of the groups first, then the mixture inside each group with its share fixed.
    ``bottom_up``: the mixture inside each group first, then the shares of the groups. Default: all
    domains at once, which had the least regret on ``tools/bench_hierarchy.py``; ``top_down`` was
    worse there than the uniform mixture."""
    group_trials: Positive | dict[str, Positive] = GROUP_TRIALS
    """With ``hierarchy``: trials inside each group, for all or by group (24 where left out);
    ``trials`` are those of the shares of the groups."""
    ensemble: bool = False
    """Also let every expert score every held-out token once, and predict any mixture from the
    average of the experts' probabilities (arXiv 2502.15950). It enters a capability's surrogate as
    a second proxy where that lowers the leave-one-out error. Costs one evaluation per expert."""
    first_share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Below 1: every candidate but the domains alone and the priors is scored on this share of each
    capability's items first, the same items for all. Then a third of them get the other items:
    those that still can win, and those that tell most of where the optimum is. What a ``command``
    scores cannot be divided, and a candidate is merged twice. On ``tools/bench_racing.py``, 40
    trials and 0.25, the mean regret of 20 searches in points of accuracy (a candidate's own
    standard error is 1.3) over 3, 5 and 7 domains:

    - on all items 0.056, 0.063 and 0.109,
    - more with racing by 0.024 +- 0.007, 0.018 +- 0.013 and 0.027 +- 0.017,
    - items saved 38 %, 37 % and 35 %.

    As many items less for every candidate alike cost 0.022 +- 0.014, 0.044 +- 0.012 and 0.025 +-
    0.006, so racing is no clear gain over fewer items here, and it is off by default."""
    failures: Positive = 3
    """So many candidates that cannot be scored, one after the other, end the search. Fewer are
    failed trials, and it goes on without them."""
    seed: int = 0
    resident: Literal["auto", "device", "host", "file"] = "auto"
    """Where every rank holds its shard of base and experts. ``device``: beside the live model.
    ``host``: in pinned host memory. ``file``: in a file in ``TMPDIR``, mapped into memory. ``auto``
    takes the first of them with enough room, and prints which."""
    replicas: Literal["auto", "candidates", "requests"] = "auto"
    """What data-parallel replicas of the model divide among them. ``candidates``: each scores
    candidates of its own. ``requests``: all are the same candidate and share what it is asked.
    ``auto`` measures both in the running search and takes the faster one. Results do not depend on
    it."""

    def num_trials(self, num_domains: int) -> int:
        """Return how many mixtures are measured at most, without the candidates for the optimum."""
        if self.strategy == "fixed":
            return num_domains + 2 + len(self.points)
        if self.strategy == "gradient":
            return num_domains + 3 + self.steps
        return self.trials

    def cost_in_trials(self, num_domains: int) -> int:
        """Return :meth:`num_trials`, a step of ``gradient`` as what it costs.

        That is its part of the items, and a backward pass as two forward passes.
        """
        if self.strategy == "gradient":
            return num_domains + 3 + math.ceil(3 * self.minibatch * self.steps)
        return self.num_trials(num_domains)

    def trials_in_group(self, name: str) -> int:
        """Return the trials that the mixture inside a group gets."""
        if isinstance(self.group_trials, dict):
            return self.group_trials.get(name, GROUP_TRIALS)
        return self.group_trials


def search_problems(config: Config) -> Iterator[Problem]:
    """Return every rule of the section that the settings break."""
    search = config.search
    least = len(config.domains) + 1
    counts_trials = search.strategy not in WITHOUT_TRIALS
    if search.hierarchy is None and search.trials < least and counts_trials:
        yield Problem(
            ("search", "trials"),
            f"is {search.trials}, expected at least {least}: every domain alone, and one mixture",
        )
    yield from _needless(config)
    if search.rounds and sum(search.rounds) != search.trials:
        yield Problem(
            ("search", "rounds"),
            f"sum to {sum(search.rounds)}, expected search.trials, {search.trials}",
        )
    if search.strategy == "fixed" and not search.points:
        yield Problem(("search", "points"), "is empty, expected the mixtures to measure")
    for number, point in enumerate(search.points):
        yield from mixture_problems(("search", "points", number), point, config.domains)
    if isinstance(search.prior, dict):
        yield from mixture_problems(("search", "prior"), search.prior, config.domains)
        without = [
            name
            for name, domain in config.domains.items()
            if not search.prior.get(name, 0.0) > 0 and domain.bounds[1] > 0
        ]
        if search.kl > 0 and without:
            yield Problem(
                ("search", "prior"),
                f"has no share of {', '.join(without)}, so search.kl would forbid it; expected a "
                "share above 0 of every domain (domains.*.bounds: [0, 0] leaves one out)",
            )


def _needless(config: Config) -> Iterator[Problem]:
    """Find settings of another strategy, which would change nothing."""
    search = config.search
    # Not model_fields_set: settings that were written down for jobs name every field.
    changed = {key for key, value in search if value != type(search).model_fields[key].default}
    for key, owners in OWNERS.items():
        if key in changed and search.strategy not in owners:
            yield Problem(
                ("search", key),
                f"belongs to search.strategy: {' or '.join(owners)}, but that is {search.strategy}",
            )
    if search.strategy in WITHOUT_TRIALS and "trials" in changed:
        yield Problem(
            ("search", "trials"),
            f"is given, but search.strategy: {search.strategy} measures its "
            f"{WITHOUT_TRIALS[search.strategy]}, however many; leave it away",
        )
    if search.strategy == "gradient" and search.hierarchy is not None:
        yield Problem(
            ("search", "hierarchy"),
            "is given, but search.strategy: gradient moves all domains at once, at the cost of one "
            "pass however many they are; leave it away",
        )
    yield from _first_share(config)
    if "prior" in changed and search.kl == 0:
        yield Problem(("search", "prior"), "is given, but search.kl is 0; set it above 0")


def _first_share(config: Config) -> Iterator[Problem]:
    """Find what cannot be scored on a share of the items first."""
    search, capabilities = config.search, config.evaluate.capabilities
    path = ("search", "first_share")
    if search.first_share == 1:
        return
    if search.strategy == "gradient":
        yield Problem(
            path,
            "is given, but search.strategy: gradient measures its steps on minibatches already; "
            "leave it away",
        )
    if search.hierarchy is not None:
        yield Problem(
            path,
            "is given, but with search.hierarchy stages share their trials, which must be scored "
            "on all items; leave one of them away",
        )
    counted = [name for name in capabilities if config.evaluate.utility.counts(name)]
    if counted and all(capabilities[name].command is not None for name in counted):
        yield Problem(
            path,
            f"is given, but a command cannot be scored on a share of its items, and all that "
            f"counts are commands ({', '.join(counted)}); leave it away",
        )
