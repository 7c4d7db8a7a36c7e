"""The paper's search (arXiv 2601.17858, section 3.2): a design, one fit, a verified optimum.

1. The base and a fixed design of ``search.trials`` mixtures are measured.
2. One surrogate per capability is fitted to the design; the utility it predicts is maximised
   over a dense set of mixtures. Two candidates are verified by real merges: the argmax and the
   mean of the ``search.top_k`` best predicted mixtures.
3. They and the best observed mixture are compared, see :mod:`megatron_mergemix.search.verdict`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from megatron_mergemix import config
from megatron_mergemix.errors import ConfigError, SearchError
from megatron_mergemix.evaluate.utility import Utility
from megatron_mergemix.journal import Trial
from megatron_mergemix.search.calibration import is_verification, utility_scale
from megatron_mergemix.search.design import design
from megatron_mergemix.search.landscape import Landscape
from megatron_mergemix.search.selection import refined_argmax, top_mean
from megatron_mergemix.search.strategy import Proposal, Recommendation
from megatron_mergemix.search.surrogates.choose import min_rows
from megatron_mergemix.search.verdict import SAME, Candidate, give_verdict, is_same, trial_of
from megatron_mergemix.simplex import (
    Array,
    Bounds,
    check_bounds,
    dense_points,
    project,
    to_mixture,
    uniform,
)


class MergeMix:
    """The single-round strategy of the paper; see the module and ``search/strategy.py``.

    Args:
        domains: their order is the order of all vectors.
        utility: the number that is maximised.
        bounds: least and largest share per domain ``(D,)`` each.
        proportional: the mixture proportional to the tokens of the domains ``(D,)``.
        settings: trials, surrogate, top_k and seed.

    Raises:
        ConfigError: the bounds contradict each other, or too few trials for the design or the
            surrogate.
    """

    def __init__(
        self,
        domains: Sequence[str],
        utility: Utility,
        bounds: tuple[Array, Array],
        proportional: Array,
        settings: config.Search,
    ) -> None:
        self.domains = tuple(domains)
        self.utility = utility
        self.bounds = Bounds(*bounds)
        self.settings = settings
        check_bounds(self.bounds, self.domains)
        needed = min_rows(settings.surrogate, len(self.domains))
        if settings.trials < needed:
            raise ConfigError(
                f"search.trials is {settings.trials}; expected at least {needed}, which "
                f"search.surrogate: {settings.surrogate} needs for {len(self.domains)} domains."
            )
        self._priors = {"uniform": uniform(len(self.domains)), "proportional": proportional}
        points = design(self.bounds, proportional, settings.trials, settings.seed)
        self._design = [Proposal(0, "base", {})] + [
            Proposal(index, purpose, to_mixture(point, self.domains))
            for index, (purpose, point) in enumerate(points, start=1)
        ]
        self._trials: dict[int, Trial] = {}
        self._learned: tuple[Landscape, list[Candidate]] | None = None

    # ---- ask and tell ----

    def tell(self, trials: Sequence[Trial]) -> None:
        """Replace what is known by ``trials``: all finished trials of this search, any order.

        Raises:
            SearchError: a trial that these settings would not have asked for.
        """
        for trial in trials:
            self._check(trial)
        before = self._designed(failed=False)
        self._trials = {trial.index: trial for trial in sorted(trials, key=lambda t: t.index)}
        if self._designed(failed=False) != before:
            self._learned = None

    def ask(self) -> list[Proposal]:
        """Return what is left of the design; once it is measured, the candidates to verify."""
        missing = [proposal for proposal in self._design if proposal.index not in self._trials]
        if missing or self._is_hopeless():
            return missing
        known = list(self._trials.values())
        wanted: list[Candidate] = []
        for candidate in self._learn()[1]:
            is_new = trial_of(candidate.mixture, known, self.domains) is None
            if is_new and not any(is_same(candidate.mixture, other.mixture) for other in wanted):
                wanted.append(candidate)
        # They take the free indices in their order, so that when only the second one has been
        # measured the first keeps its index.
        first = len(self._design)
        free = [i for i in range(first, first + len(known) + 2) if i not in self._trials]
        return [
            Proposal(index, candidate.purpose, to_mixture(candidate.mixture, self.domains))
            for index, candidate in zip(free, wanted, strict=False)
        ]

    def done(self) -> bool:
        """Return whether the design and the candidates are measured."""
        return not self.ask()

    def _check(self, trial: Trial) -> None:
        """Refuse a trial that this strategy would not have asked for."""
        if trial.index >= len(self._design):
            if is_verification(trial):
                return  # also of another surrogate's candidate: a measured mixture stays true
            raise SearchError(
                f"Trial {trial.index} of the journal ({trial.purpose}) is beyond the "
                f"{self.settings.trials} of search.trials. The journal belongs to other settings: "
                "restore them, or use another run_dir."
            )
        planned = self._design[trial.index]
        if not _agree(trial.mixture, planned.mixture):
            raise SearchError(
                f"Trial {trial.index} of the journal measured {_text(trial.mixture)}, but these "
                f"settings ask for {_text(planned.mixture)} ({planned.purpose}). The journal "
                "belongs to other domains, tokens, bounds, search.trials or search.seed: restore "
                "them, or use another run_dir."
            )

    # ---- learn and recommend ----

    def _designed(self, failed: bool) -> list[Trial]:
        """Return the trials of the design, without the base, that failed or that did not."""
        planned = (self._trials.get(proposal.index) for proposal in self._design[1:])
        return [trial for trial in planned if trial and (trial.error is not None) == failed]

    def _is_hopeless(self) -> bool:
        return 2 * len(self._designed(failed=True)) > self.settings.trials

    def _learn(self) -> tuple[Landscape, list[Candidate]]:
        """Return what the design teaches; it does not depend on verifying trials."""
        if self._learned is None:
            trials = self._designed(failed=False)
            scale = utility_scale(self.utility, trials)
            landscape = Landscape(
                trials, self.domains, self.utility, scale, self.settings.surrogate
            )
            self._learned = landscape, self._candidates(landscape)
        return self._learned

    def _candidates(self, landscape: Landscape) -> list[Candidate]:
        seed = self.settings.seed
        points = dense_points(self.bounds, np.random.default_rng([seed, 2]))
        predicted = landscape(points)
        mean = project(top_mean(points, predicted, self.settings.top_k), self.bounds)
        rng = np.random.default_rng([seed, 3])
        argmax = refined_argmax(landscape, points, predicted, self.bounds, rng)
        return [
            Candidate("argmax", "verify:argmax", argmax),
            Candidate("top-k mean", "verify:top-k", mean),
        ]

    def recommend(self) -> Recommendation:
        """Return the verified candidate that the trials together speak for.

        Raises:
            SearchError: the design is not finished, or more than half of it failed.
        """
        failed = self._designed(failed=True)
        if self._is_hopeless():
            raise SearchError(
                f"{len(failed)} of {self.settings.trials} trials of the design failed; at least "
                f"half must succeed. The first, trial {failed[0].index}: {failed[0].error}"
            )
        missing = [proposal for proposal in self._design if proposal.index not in self._trials]
        if missing:
            raise SearchError(
                f"{len(missing)} of {len(self._design)} trials are not measured yet; continue the "
                "search before asking for its result."
            )
        landscape, candidates = self._learn()
        verdict = give_verdict(
            candidates,
            self._priors,
            list(self._trials.values()),
            self.domains,
            self.bounds,
            landscape,
        )
        if not failed:
            return verdict
        note = (
            f"{len(failed)} of {self.settings.trials} trials of the design failed and were left "
            f"out: {', '.join(str(trial.index) for trial in failed)}."
        )
        return replace(verdict, notes=[note, *verdict.notes])


def _agree(measured: Mapping[str, float], planned: Mapping[str, float]) -> bool:
    """Return whether two mixtures are the same; the base is the empty one."""
    if not measured or not planned:
        return not measured and not planned
    names = set(measured) | set(planned)
    return all(abs(measured.get(n, 0.0) - planned.get(n, 0.0)) <= SAME for n in names)


def _text(mixture: Mapping[str, float]) -> str:
    shares = ", ".join(f"{name}: {share:.4g}" for name, share in mixture.items())
    return f"{{{shares}}}" if mixture else "the base"
