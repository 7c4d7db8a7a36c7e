"""What all strategies share: rounds of mixtures, then verified candidates, then a verdict.

1. The base and the mixtures of the first round are measured: a design that no trial decides. What
   the scale and the comparisons rest on (the base, every domain alone, the priors) is asked once
   more where it failed.
2. Every later round is planned from the trials of the rounds before it, until a strategy has
   nothing left to explore. Strategies differ in this alone.
3. One surrogate per capability is fitted to all of them; the utility it predicts is maximised over
   a dense set of mixtures. Two candidates are verified by real merges: the argmax and the mean of
   the ``search.top_k`` best predicted mixtures.
4. They and the best observed mixture are compared; the mean wins unless another is surely better,
   see :mod:`megatron_mergemix.search.verdict`.

With ``search.first_share`` a round is a race: its mixtures are scored on a share of the items, and
waves of those that still can win get the rest, see :mod:`megatron_mergemix.search.racing`.

A journal is replayed by planning the rounds again. Rounds that were planned from trials are then
taken from the journal as far as it holds them: what was measured stays true, also where another
machine would round a fit differently and pick another mixture.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from megatron_mergemix import config
from megatron_mergemix.errors import ConfigError, SearchError
from megatron_mergemix.evaluate.utility import Utility
from megatron_mergemix.mixtures.simplex import (
    Array,
    Bounds,
    check_bounds,
    dense_points,
    project,
    to_mixture,
    uniform,
)
from megatron_mergemix.search.calibration import utility_scale
from megatron_mergemix.search.design import failed_anchors
from megatron_mergemix.search.ensemble import Ensemble
from megatron_mergemix.search.first_share import on_all_items
from megatron_mergemix.search.landscape import Landscape
from megatron_mergemix.search.preference import Preference
from megatron_mergemix.search.purposes import (
    is_anchor,
    is_designed,
    is_gradient,
    is_race,
    is_verification,
)
from megatron_mergemix.search.racing import measured_wave, next_wave, wave_of
from megatron_mergemix.search.replay import agree, as_verified, check_asked_for
from megatron_mergemix.search.selection import refined_argmax, top_mean
from megatron_mergemix.search.strategy import Proposal, Recommendation
from megatron_mergemix.search.surrogates.choose import min_rows
from megatron_mergemix.search.verdict import Candidate, give_verdict, is_same, trial_of
from megatron_mergemix.trials import Minibatch, Trial


class RoundStrategy(ABC):
    """A search in rounds; see the module and ``search/strategy.py``.

    Args:
        domains: their order is the order of all vectors.
        utility: the number that is maximised.
        bounds: least and largest share per domain ``(D,)`` each.
        proportional: the mixture proportional to the tokens of the domains ``(D,)``.
        settings: of the section ``search``.
        ensemble: what the experts' probabilities predict, for ``search.ensemble``; else None.

    Raises:
        ConfigError: the bounds contradict each other, or too few trials for the first round or
            the surrogate.
    """

    favourite = "top-k mean"
    """The candidate that wins unless another is surely better."""

    def __init__(
        self,
        domains: Sequence[str],
        utility: Utility,
        bounds: tuple[Array, Array],
        proportional: Array,
        settings: config.Search,
        ensemble: Ensemble | None = None,
    ) -> None:
        self.domains = tuple(domains)
        self.utility = utility
        self.bounds = Bounds(*bounds)
        self.proportional = proportional
        self.settings = settings
        self.preference = Preference(settings, domains, proportional)
        self.ensemble = ensemble
        check_bounds(self.bounds, self.domains)
        self._trials: dict[int, Trial] = {}
        self._rounds = [self._numbered([("base", None), *self.plan_round(0, [])], first=0)]
        self._num_designed = len(self._rounds[0])
        self._is_explored = False
        self._learned: tuple[Landscape, list[Candidate]] | None = None
        self._check_number_of_trials()

    @abstractmethod
    def plan_round(self, number: int, trials: Sequence[Trial]) -> Sequence[tuple[str, Array]]:
        """Return the mixtures of a round ``(D,)`` with their purposes; none ends the exploration.

        Deterministic. The first round, number 0, looks at no trial. Purposes of later rounds are
        ``round:<number>``, or ``gradient:<number>`` where :meth:`minibatch` names one; see
        :mod:`~megatron_mergemix.search.purposes`.

        Args:
            number: 0, 1, ...
            trials: the successful trials of mixtures in all rounds before, by index.

        Raises:
            SearchError: too few of them for what they are to teach.
        """

    def minibatch(self, purpose: str) -> Minibatch | None:
        """Return what a planned mixture is differentiated on; None scores it instead."""
        return None

    def setting_of_first_fit(self) -> str | None:
        """Return the setting that changes the rows of the first fit; None where none does."""
        return "search.trials"

    def mixtures_to_come(self) -> int:
        """Return how many more are measured, beyond those planned, before the first fit."""
        return 0

    # ---- ask and tell ----

    def tell(self, trials: Sequence[Trial]) -> None:
        """Replace what is known by ``trials``: all finished trials of this search, any order.

        Raises:
            SearchError: a trial that these settings would not have asked for.
        """
        known = {trial.index: trial for trial in sorted(trials, key=lambda t: t.index)}
        self._forget_rounds_after_a_change(known)
        self._trials = known
        self._plan_rounds()
        for trial in known.values():
            self._check(trial)

    def ask(self) -> list[Proposal]:
        """Return what is left of the round; once all are measured, the candidates to verify."""
        missing = [p for p in self._planned() if p.index not in self._trials]
        if missing or self._is_hopeless():
            return missing
        known = list(self._trials.values())
        whole = [trial for trial in known if trial.first is None]
        wanted: list[Candidate] = []
        for candidate in self._candidates():
            is_new = trial_of(candidate.mixture, whole, self.domains) is None
            if is_new and not any(is_same(candidate.mixture, other.mixture) for other in wanted):
                wanted.append(candidate)
        # They take the free indices in their order, so that when only the second one has been
        # measured the first keeps its index.
        first = len(self._planned())
        free = [i for i in range(first, first + len(known) + 2) if i not in self._trials]
        return [
            Proposal(index, candidate.purpose, to_mixture(candidate.mixture, self.domains))
            for index, candidate in zip(free, wanted, strict=False)
        ]

    def done(self) -> bool:
        """Return whether all rounds and the candidates are measured."""
        return not self.ask()

    # ---- rounds ----

    def _planned(self) -> list[Proposal]:
        return [proposal for round_ in self._rounds for proposal in round_]

    def _numbered(self, named: Sequence[tuple[str, Array | None]], first: int) -> list[Proposal]:
        share = self.settings.first_share
        return [
            Proposal(
                index,
                purpose,
                {} if point is None else to_mixture(point, self.domains),
                self.minibatch(purpose),
                first=None if share == 1 or is_anchor(purpose) else share,
            )
            for index, (purpose, point) in enumerate(named, start=first)
        ]

    def _plan_rounds(self) -> None:
        """Plan rounds for as long as all the planned ones are measured."""
        while not self._is_explored and not self._is_hopeless():
            if any(proposal.index not in self._trials for proposal in self._rounds[-1]):
                return
            if again := self._failed_anchors():
                self._rounds[0] = [*self._rounds[0], *again]
                continue
            self._check_rows()
            if wave := self._wave():
                self._rounds.append(wave)
                continue
            number = sum(not is_race(round_[0].purpose) for round_ in self._rounds)
            named = self.plan_round(number, on_all_items(self._explored(failed=False)))
            self._is_explored = not named
            if named:
                proposals = self._numbered(named, first=len(self._planned()))
                self._rounds.append([self._as_measured(proposal) for proposal in proposals])

    def _failed_anchors(self) -> list[Proposal]:
        """Return what of the design is asked once more; none where the journal went on from it."""
        first = len(self._planned())
        if first > self._num_designed:
            return []
        again = failed_anchors(self._rounds[0], self._trials)
        there = self._trials.get(first)
        went_on = there is not None and bool(again) and there.purpose != again[0].purpose
        return [] if went_on else again

    def _wave(self) -> list[Proposal]:
        """Return who gets the rest of the items next; none where no other can win any more."""
        explored = self._explored(failed=False)
        if not any(trial.first is not None for trial in explored):
            return []
        raced = [proposal for proposal in self._planned() if is_race(proposal.purpose)]
        number = 1 + max((wave_of(proposal.purpose) for proposal in raced), default=0)
        first = len(self._planned())
        there = measured_wave(self._trials, first, number)
        if any(index >= first + len(there) for index in self._trials):
            return there  # and the journal went on from here
        seed = self.settings.seed
        wave = next_wave(
            explored, raced, self.race_landscape, self.domains, self.bounds, self.preference, seed
        )
        left = [trial for trial in wave if not any(agree(t.mixture, trial.mixture) for t in there)]
        return [
            *there,
            *(
                Proposal(index, f"race:{number}", trial.mixture, begun=trial.scores)
                for index, trial in enumerate(
                    left[: max(0, len(wave) - len(there))], first + len(there)
                )
            ),
        ]

    def _as_measured(self, planned: Proposal) -> Proposal:
        """Return the proposal of a later round as the journal has it, if it has it."""
        trial = self._trials.get(planned.index)
        if trial is None or trial.purpose != planned.purpose or not trial.mixture:
            return planned
        return replace(planned, mixture=dict(trial.mixture))

    def _forget_rounds_after_a_change(self, known: Mapping[int, Trial]) -> None:
        """Drop what was planned from trials that are no longer what they were."""
        for number, round_ in enumerate(self._rounds):
            changed = any(
                known.get(proposal.index) != self._trials.get(proposal.index) for proposal in round_
            )
            if changed:
                del self._rounds[number + 1 :]
                if number == 0:
                    self._rounds[0] = self._rounds[0][: self._num_designed]
                self._is_explored = False
                self._learned = None
                return

    def _check(self, trial: Trial) -> None:
        """Refuse a trial that this strategy would not have asked for."""
        planned = self._planned()
        if trial.index >= len(planned):
            if is_verification(trial) or not (self._is_explored or is_designed(trial)):
                return  # also of another surrogate's candidate: a measured mixture stays true
            raise SearchError(
                f"Trial {trial.index} of the journal ({trial.purpose}) is beyond the "
                f"{len(planned) - 1} mixtures that search.strategy: {self.settings.strategy} "
                "asks for. The journal belongs to other settings: restore them, or use another "
                "run_dir."
            )
        check_asked_for(trial, planned[trial.index])

    def _check_number_of_trials(self) -> None:
        """Refuse fewer trials than the surrogate needs when it is first fitted."""
        rows = self._num_designed - 1 + self.mixtures_to_come()  # all but the base
        setting = self.setting_of_first_fit()
        needed = min_rows(self.settings.surrogate, len(self.domains))
        if rows < needed:
            raise ConfigError(
                f"search.strategy: {self.settings.strategy} first fits a surrogate to {rows} "
                f"mixtures; expected at least {needed}, which search.surrogate: "
                f"{self.settings.surrogate} needs for {len(self.domains)} domains. "
                f"{f'Raise {setting}, or use' if setting else 'Use'} another search.surrogate."
            )

    def _check_rows(self) -> None:
        """Refuse to go on where so many of the design failed that no surrogate can be fitted."""
        scored = [t for t in self._explored(failed=False) if not is_gradient(t)]
        failed = self._explored(failed=True)
        needed = min_rows(self.settings.surrogate, len(self.domains))
        if failed and len(scored) + self.mixtures_to_come() < needed:
            raise SearchError(
                f"{len(scored)} of the {len(scored) + len(failed)} mixtures of the design were "
                f"scored, but search.surrogate: {self.settings.surrogate} needs {needed} for "
                f"{len(self.domains)} domains. The first that failed, trial {failed[0].index}: "
                f"{failed[0].error} Mend the cause, and begin a search in another run_dir."
            )

    # ---- learn and recommend ----

    def _explored(self, failed: bool) -> list[Trial]:
        """Return the trials of all rounds, without the base, that failed or that did not."""
        planned = (self._trials.get(p.index) for p in self._planned() if p.mixture)
        return [trial for trial in planned if trial and (trial.error is not None) == failed]

    def _is_hopeless(self) -> bool:
        return 2 * len(self._explored(failed=True)) > self._num_mixtures()

    def _num_mixtures(self) -> int:
        return sum(bool(proposal.mixture) for proposal in self._planned())

    def landscape(self, trials: Sequence[Trial]) -> Landscape:
        """Return what successful trials teach; the scale is that of the first round."""
        scored = [trial for trial in trials if not is_gradient(trial)]
        scale, surrogate = utility_scale(self.utility, scored), self.settings.surrogate
        return Landscape(scored, self.domains, self.utility, scale, surrogate, self.ensemble)

    def race_landscape(self, trials: Sequence[Trial]) -> Landscape:
        """Return what successful trials teach while they race."""
        scale = utility_scale(self.utility, trials)
        return Landscape(trials, self.domains, self.utility, scale, "gp")

    def _learn(self) -> tuple[Landscape, list[Candidate]]:
        """Return what all rounds teach; it does not depend on verifying trials."""
        if self._learned is None:
            landscape = self.landscape(on_all_items(self._explored(failed=False)))
            self._learned = landscape, self.candidates(landscape)
        return self._learned

    def _candidates(self) -> list[Candidate]:
        """Return the candidates, those that were verified already as they were."""
        known = list(self._trials.values())
        return [as_verified(candidate, known, self.domains) for candidate in self._learn()[1]]

    def candidates(self, landscape: Landscape) -> list[Candidate]:
        """Return the mixtures that are worth a real merge when everything is explored."""

        def worth(mixtures: Array) -> Array:
            return landscape(mixtures) + self.preference(mixtures)

        seed = self.settings.seed
        points = dense_points(self.bounds, np.random.default_rng([seed, 2]))
        predicted = worth(points)
        mean = project(top_mean(points, predicted, self.settings.top_k), self.bounds)
        rng = np.random.default_rng([seed, 3])
        argmax = refined_argmax(worth, points, predicted, self.bounds, rng)
        return [
            Candidate("argmax", "verify:argmax", argmax),
            Candidate("top-k mean", "verify:top-k", mean),
        ]

    def recommend(self) -> Recommendation:
        """Return the verified candidate that the trials together speak for.

        Raises:
            SearchError: the rounds are not finished, or more than half of their trials failed.
        """
        failed, total = self._explored(failed=True), self._num_mixtures()
        if self._is_hopeless():
            raise SearchError(
                f"{len(failed)} of {total} trials failed; at least half must succeed. The first, "
                f"trial {failed[0].index}: {failed[0].error} Mend the cause, and begin a search in "
                "another run_dir."
            )
        missing = [proposal for proposal in self._planned() if proposal.index not in self._trials]
        if missing:
            raise SearchError(
                f"{len(missing)} of {len(self._planned())} trials are not measured yet; continue "
                "the search before asking for its result."
            )
        landscape, _ = self._learn()
        verdict = give_verdict(
            self._candidates(),
            {"uniform": uniform(len(self.domains)), "proportional": self.proportional},
            list(self._trials.values()),
            self.domains,
            self.bounds,
            landscape,
            self.preference,
            seed=self.settings.seed,
            favourite=self.favourite,
        )
        if not failed:
            return verdict
        note = (
            f"{len(failed)} of {total} trials failed and were left out: "
            f"{', '.join(str(trial.index) for trial in failed)}."
        )
        return replace(verdict, notes=[note, *verdict.notes])
