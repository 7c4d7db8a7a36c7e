"""The paper's search (arXiv 2601.17858, section 3.2): a design, one fit, a verified optimum.

1. The base and a fixed design of ``search.trials`` mixtures are measured.
2. One surrogate per capability is fitted to the design; the utility it predicts is maximised
   over a dense set of mixtures. Two candidates are verified by real merges: the argmax and the
   mean of the ``search.top_k`` best predicted mixtures.
3. They and the best observed mixture are compared.

The paper does not say how the winner is picked. The best of many noisy measurements is mostly
the luckiest one, so candidates are not compared by their measurements alone but by what a
Gaussian process expects at them after it has learned every trial, verifications included. Where
the noise is small that is the measurement; where it is large, lucky trials are not believed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from megatron_mergemix import config
from megatron_mergemix.errors import ConfigError, SearchError
from megatron_mergemix.evaluate.utility import Scale, Utility
from megatron_mergemix.journal import Trial
from megatron_mergemix.search.design import design
from megatron_mergemix.search.landscape import Landscape, measurements
from megatron_mergemix.search.selection import refined_argmax, top_mean
from megatron_mergemix.search.strategy import Proposal, Recommendation
from megatron_mergemix.search.surrogates.choose import min_rows
from megatron_mergemix.simplex import (
    Array,
    Bounds,
    check_bounds,
    dense_points,
    project,
    to_mixture,
    to_vector,
    within,
)

SAME = 1e-6
"""Mixtures whose shares all agree to this are one mixture; a resumed search may run on another
machine, whose last bits differ."""

POOR_RANKING = 0.5
"""A leave-one-out rank correlation below this earns a warning."""

NUM_BASE_TRIALS = 1


class Candidate(NamedTuple):
    """A mixture that may be recommended."""

    name: str
    purpose: str
    mixture: Array
    predicted: float


@dataclass(frozen=True)
class Learned:
    """What the finished design teaches."""

    scale: Scale
    predict: Landscape
    candidates: Sequence[Candidate]


class MergeMix:
    """The single-round strategy of the paper; see the module and ``search/strategy.py``.

    Args:
        domains: their order is the order of all vectors.
        utility: the number that is maximised.
        bounds: least and largest share per domain.
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
        self.proportional = proportional
        points = design(self.bounds, proportional, settings.trials, settings.seed)
        self._design = [Proposal(0, "base", {})] + [
            Proposal(index, purpose, to_mixture(point, self.domains))
            for index, (purpose, point) in enumerate(points, start=NUM_BASE_TRIALS)
        ]
        self._trials: dict[int, Trial] = {}
        self._learned: Learned | None = None

    # ---- ask and tell ----

    def tell(self, trials: Sequence[Trial]) -> None:
        """Replace what is known by ``trials``: all finished trials of this search, any order.

        Raises:
            SearchError: a trial of the design measured another mixture than these settings ask
                for, or a trial was asked by another strategy.
        """
        for trial in trials:
            self._check(trial)
        self._trials = {trial.index: trial for trial in sorted(trials, key=lambda t: t.index)}
        self._learned = None

    def ask(self) -> list[Proposal]:
        """Return what is left of the design; once it is measured, the candidates to verify."""
        missing = [proposal for proposal in self._design if proposal.index not in self._trials]
        if missing or self._hopeless():
            return missing
        wanted: list[Candidate] = []
        for candidate in self._learn().candidates:
            known = [other.mixture for other in wanted]
            if not self._trials_at(candidate.mixture) and not _is_among(candidate.mixture, known):
                wanted.append(candidate)
        # Candidates without a trial take the free indices in their order, so that an answer to
        # only the second one leaves the first its index.
        first = len(self._design)
        free = [i for i in range(first, first + len(self._trials) + 2) if i not in self._trials]
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
            if trial.purpose.startswith("verify:"):
                return  # also of another utility or surrogate: a measured mixture stays true
            raise SearchError(
                f"Trial {trial.index} of the journal ({trial.purpose}) is beyond the "
                f"{len(self._design) - NUM_BASE_TRIALS} of search.trials. The journal belongs to "
                "other settings: restore them, or use another run_dir."
            )
        expected = self._design[trial.index]
        if not _agree(trial.mixture, expected.mixture):
            raise SearchError(
                f"Trial {trial.index} of the journal measured {_text(trial.mixture)}, but these "
                f"settings ask for {_text(expected.mixture)} ({expected.purpose}). The journal "
                "belongs to other domains, tokens, bounds, search.trials or search.seed: restore "
                "them, or use another run_dir."
            )

    # ---- learn ----

    def _successful_design(self) -> list[Trial]:
        """Return the successful trials of the design, without the base."""
        planned = (self._trials.get(proposal.index) for proposal in self._design[NUM_BASE_TRIALS:])
        return [trial for trial in planned if trial is not None and trial.error is None]

    def _failed_design(self) -> list[int]:
        """Return the indices of the failed trials of the design, without the base."""
        return [
            index
            for index, trial in self._trials.items()
            if NUM_BASE_TRIALS <= index < len(self._design) and trial.error is not None
        ]

    def _hopeless(self) -> bool:
        return 2 * len(self._failed_design()) > self.settings.trials

    def _learn(self) -> Learned:
        """Return what the design teaches; it does not depend on verifying trials."""
        if self._learned is None:
            trials = self._successful_design()
            values, _ = measurements(trials, self.utility)
            purposes = [self._design[trial.index].purpose for trial in trials]
            scale = self.utility.calibrate(values, np.array([p == "vertex" for p in purposes]))
            predict = Landscape(trials, self.domains, self.utility, scale, self.settings.surrogate)
            self._learned = Learned(scale, predict, self._optima(predict))
        return self._learned

    def _optima(self, predict: Landscape) -> list[Candidate]:
        """Return the candidates that are worth a real merge."""
        points = dense_points(self.bounds, np.random.default_rng([self.settings.seed, 2]))
        predicted = predict(points)
        rng = np.random.default_rng([self.settings.seed, 3])
        argmax = refined_argmax(predict, points, predicted, self.bounds, rng)
        mean = project(top_mean(points, predicted, self.settings.top_k), self.bounds)
        heights = predict(np.array([argmax, mean]))
        return [
            Candidate("argmax", "verify:argmax", argmax, float(heights[0])),
            Candidate("top-k mean", "verify:top-k", mean, float(heights[1])),
        ]

    def _trials_at(self, mixture: Array) -> list[Trial]:
        """Return the trials of a mixture, successful ones first."""
        at = [
            trial
            for trial in self._trials.values()
            if trial.mixture and _is_among(mixture, [to_vector(trial.mixture, self.domains)])
        ]
        return sorted(at, key=lambda trial: trial.error is not None)

    # ---- recommend ----

    def recommend(self) -> Recommendation:
        """Return the verified candidate that the trials together speak for.

        Raises:
            SearchError: the design is not finished, or more than half of it failed.
        """
        self._check_finished()
        learned = self._learn()
        measured = [
            trial
            for trial in self._trials.values()
            if trial.mixture
            and trial.error is None
            and within(to_vector(trial.mixture, self.domains), self.bounds)
        ]
        expect = Landscape(measured, self.domains, self.utility, learned.scale, "gp")
        alternatives = self._alternatives(learned, measured, expect)
        names = [name for name in ("top-k mean", "argmax", "best observed") if name in alternatives]
        winner = max(names, key=lambda name: alternatives[name]["expected"])
        _add_gains(alternatives, winner)
        return Recommendation(
            mixture=alternatives[winner]["mixture"],
            source=winner,
            utility=alternatives[winner]["observed"],
            utility_stderr=alternatives[winner]["stderr"],
            alternatives=alternatives,
            surrogates=learned.predict.evidence,
            notes=self._notes(learned, alternatives, winner),
        )

    def _check_finished(self) -> None:
        failed = self._failed_design()
        if self._hopeless():
            first = self._trials[failed[0]]
            raise SearchError(
                f"{len(failed)} of {self.settings.trials} trials of the design failed; at least "
                f"half must succeed. The first, trial {first.index}: {first.error}"
            )
        missing = len([p for p in self._design if p.index not in self._trials])
        if missing:
            raise SearchError(
                f"{missing} trials of the design are not measured yet; continue the search."
            )

    def _alternatives(
        self, learned: Learned, measured: Sequence[Trial], expect: Landscape
    ) -> dict[str, dict[str, Any]]:
        """Return every measured candidate and prior by name, with its numbers."""
        best = max(measured, key=lambda t: self.utility.of_trial(t.scores, learned.scale).value)
        wanted = [(candidate.name, candidate.mixture) for candidate in learned.candidates]
        wanted.append(("best observed", to_vector(best.mixture, self.domains)))
        for name, prior in (
            ("uniform", np.full(len(self.domains), 1 / len(self.domains))),
            ("proportional", self.proportional),
        ):
            wanted.append((name, project(prior, self.bounds)))
        alternatives = {}
        for name, mixture in wanted:
            trials = [trial for trial in self._trials_at(mixture) if trial.error is None]
            if not trials:
                continue
            observed = self.utility.of_trial(trials[0].scores, learned.scale)
            alternatives[name] = {
                "mixture": dict(trials[0].mixture),
                "predicted": float(learned.predict(mixture[None])[0]),
                "observed": observed.value,
                "stderr": observed.stderr,
                "expected": float(expect(mixture[None])[0]),
                "trial": trials[0].index,
            }
        return alternatives

    def _notes(
        self, learned: Learned, alternatives: Mapping[str, Mapping[str, Any]], winner: str
    ) -> list[str]:
        """Return what a reader must know before trusting the numbers."""
        notes = []
        failed = self._failed_design()
        if failed:
            notes.append(
                f"{len(failed)} of {self.settings.trials} trials of the design failed and were "
                f"left out: {', '.join(map(str, failed))}."
            )
        for capability, evidence in learned.predict.evidence.items():
            if evidence["spearman"] < POOR_RANKING:
                notes.append(
                    f"The surrogate of {capability} ranks left-out trials poorly (Spearman "
                    f"{evidence['spearman']:.2f}): its optimum is hardly better than a guess."
                )
        for candidate in learned.candidates:
            if candidate.name not in alternatives:
                notes.append(f"The {candidate.name} candidate was not measured, so it cannot win.")
        luckier = alternatives["best observed"]
        if luckier["observed"] > alternatives[winner]["observed"]:
            notes.append(
                f"Trial {luckier['trial']} measured {luckier['observed']:.4g}, more than the "
                f"{alternatives[winner]['observed']:.4g} of the {winner}; the other trials put "
                "that down to luck."
            )
        for name in ("uniform", "proportional"):
            gain, stderr = (alternatives.get(name, {}).get(k) for k in ("gain", "gain_stderr"))
            if gain is not None and stderr is not None and gain < 2 * stderr:
                notes.append(
                    f"The gain over the {name} mixture, {gain:.4g}, is less than twice its "
                    f"standard error, {stderr:.4g}."
                )
        return notes


def _add_gains(alternatives: Mapping[str, dict[str, Any]], winner: str) -> None:
    """Add to each alternative by how much the winner measured more, and the error of that.

    The error takes both measurements as independent; trials that share their items differ by
    less, so it is an upper limit.
    """
    best = alternatives[winner]
    for other in alternatives.values():
        same = other["trial"] == best["trial"]
        known = best["stderr"] is not None and other["stderr"] is not None
        other["gain"] = best["observed"] - other["observed"]
        other["gain_stderr"] = None
        if known:
            other["gain_stderr"] = 0.0 if same else float(np.hypot(best["stderr"], other["stderr"]))


def _is_among(mixture: Array, others: Sequence[Array]) -> bool:
    return any(float(np.abs(mixture - other).max()) <= SAME for other in others)


def _agree(measured: Mapping[str, float], expected: Mapping[str, float]) -> bool:
    """Return whether two mixtures are the same; the base is the empty one."""
    if not measured or not expected:
        return not measured and not expected
    names = set(measured) | set(expected)
    return all(abs(measured.get(n, 0.0) - expected.get(n, 0.0)) <= SAME for n in names)


def _text(mixture: Mapping[str, float]) -> str:
    shares = ", ".join(f"{name}: {share:.4g}" for name, share in mixture.items())
    return f"{{{shares}}}" if mixture else "the base"
