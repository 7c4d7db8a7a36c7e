"""One stage of a hierarchical search: a search of its own in a part of the mixtures.

A stage hands proposals of its strategy on as mixtures of all domains, numbered behind the stages
before it and with its name in their purpose: ``math/lattice``. What an earlier stage has measured
already is not measured again; the strategy gets that trial as its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from megatron_mergemix.errors import SearchError
from megatron_mergemix.evaluate.utility import Scale, Utility
from megatron_mergemix.mixtures.levels import Frame
from megatron_mergemix.mixtures.simplex import Array, to_mixture, to_vector
from megatron_mergemix.search.design import failed_anchors
from megatron_mergemix.search.purposes import is_verification, stage_of
from megatron_mergemix.search.replay import is_of_kind
from megatron_mergemix.search.strategy import Proposal, Recommendation, Strategy
from megatron_mergemix.search.verdict import SAME, is_same, trial_of
from megatron_mergemix.trials import Gradient, Trial


class OnOneScale(Utility):
    """A utility whose scale is given, so that all stages maximise the same number.

    Args:
        utility: what it is but for the scale.
        scale: of the first stage.
    """

    has_given_scale = True

    def __init__(self, utility: Utility, scale: Scale) -> None:
        super().__init__(utility.settings, utility.objective)
        self._scale = scale

    def calibrate(self, values: Array, is_vertex: NDArray[np.bool_]) -> Scale:
        """Return the given scale."""
        return self._scale


class Listed:
    """Measures given mixtures and advises nothing; asked and told like a strategy.

    What verifies something may have been measured elsewhere: another machine rounds fits
    differently, and what was measured stays true.

    Args:
        named: mixtures ``(D,)`` with their purposes; one that occurs before is left out.
        domains: their order is the order of the mixtures.
    """

    def __init__(self, named: Sequence[tuple[str, Array]], domains: Sequence[str]) -> None:
        self._domains = domains
        self._points: list[Array] = []
        self._planned = [Proposal(0, "base", {})]
        for purpose, point in named:
            if not any(is_same(point, other) for other in self._points):
                self._points.append(point)
                mixture = to_mixture(point, domains)
                self._planned.append(Proposal(len(self._points), purpose, mixture))
        self._again: list[Proposal] = []
        self._known: frozenset[int] = frozenset()

    def tell(self, trials: Sequence[Trial]) -> None:
        """Replace what is known.

        Raises:
            SearchError: a trial of another mixture.
        """
        known = {trial.index: trial for trial in trials}
        is_whole = all(proposal.index in known for proposal in self._planned)
        self._again = failed_anchors(self._planned, known) if is_whole else []
        for trial in trials:
            if not self._is_planned(trial):
                raise SearchError(
                    f"the journal has a {trial.purpose} that these settings do not ask for; it "
                    "belongs to other domains, tokens or bounds. Restore them, or use another "
                    "run_dir."
                )
        self._known = frozenset(known)

    def _is_planned(self, trial: Trial) -> bool:
        planned = [*self._planned, *self._again]
        if trial.index >= len(planned) or not is_of_kind(trial, planned[trial.index].purpose):
            return False
        wanted = planned[trial.index].mixture
        if not trial.mixture or not wanted:
            return not trial.mixture and not wanted
        points = (to_vector(mixture, self._domains) for mixture in (trial.mixture, wanted))
        return is_verification(trial) or is_same(*points)

    def ask(self) -> list[Proposal]:
        """Return what is not measured."""
        planned = [*self._planned, *self._again]
        return [proposal for proposal in planned if proposal.index not in self._known]

    def done(self) -> bool:
        """Return whether everything is measured."""
        return not self.ask()

    def recommend(self) -> Recommendation:
        """Raise SearchError: a list advises nothing."""
        raise SearchError("a list of mixtures has no recommendation")


class Stage:
    """Translates between one strategy and the whole search.

    Args:
        name: of the stage; how the purposes of its trials begin.
        strategy: knows the coordinates of ``frame`` only, and no trials yet.
        frame: where the stage moves.
        domains: their order is the order of all mixtures.
        before: the trials of all stages before.

    Attributes:
        trials: what was told last, of this stage only.
        reused: index within the strategy -> trial of an earlier stage.
    """

    def __init__(
        self,
        name: str,
        strategy: Strategy,
        frame: Frame,
        domains: Sequence[str],
        before: Sequence[Trial],
    ) -> None:
        self.name, self.frame, self.strategy = name, frame, strategy
        self.trials: tuple[Trial, ...] = ()
        self._domains = domains
        self._first = 1 + max((trial.index for trial in before), default=-1)
        planned = strategy.ask()
        found = {proposal.index: self._measured(proposal, before) for proposal in planned}
        self.reused = {
            proposal.index: self._as_proposed(trial, proposal)
            for proposal in planned
            if (trial := found[proposal.index]) is not None
        }
        self._own = [proposal.index for proposal in planned if proposal.index not in self.reused]
        self._beyond = len(planned)
        self._advice: Recommendation | None = None
        strategy.tell(list(self.reused.values()))

    def owns(self, trial: Trial) -> bool:
        """Return whether a trial of the search belongs to this stage, by its place and purpose."""
        if trial.purpose == "base":
            return trial.index == self._first == 0
        return trial.index >= self._first and stage_of(trial.purpose) == self.name

    def tell(self, trials: Sequence[Trial]) -> None:
        """Replace what is known by the trials of the search that belong here.

        Raises:
            SearchError: one that these settings would not have asked for.
        """
        owned = tuple(sorted(filter(self.owns, trials), key=lambda trial: trial.index))
        if owned == self.trials:
            return
        with self._named():
            self.strategy.tell([*self.reused.values(), *map(self._inward, owned)])
        self.trials, self._advice = owned, None

    def ask(self) -> list[Proposal]:
        """Return the next proposals of the stage as mixtures of all domains."""
        with self._named():
            return [self._outward(proposal) for proposal in self.strategy.ask()]

    def done(self) -> bool:
        """Return whether nothing is left to ask here."""
        return not self.ask()

    def recommend(self) -> Recommendation:
        """Return the advice of the strategy, over the variables of the frame.

        Raises:
            SearchError: too few trials of this stage succeeded.
        """
        if self._advice is None:
            with self._named():
                self._advice = self.strategy.recommend()
        return self._advice

    def mixture(self, coordinates: Mapping[str, float]) -> dict[str, float]:
        """Return the mixture of all domains at these coordinates; none are the base."""
        if not coordinates:
            return {}
        vector = to_vector(coordinates, self.frame.variables)
        return to_mixture(self.frame.embed(vector), self._domains)

    # ---- between the strategy's numbers and those of the whole search ----

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Say which stage an error is about."""
        try:
            yield
        except SearchError as error:
            raise SearchError(f"search.hierarchy, stage {self.name}: {error}") from error

    def _measured(self, proposal: Proposal, before: Sequence[Trial]) -> Trial | None:
        mixture = self.mixture(proposal.mixture)
        if mixture:
            return trial_of(to_vector(mixture, self._domains), before, self._domains)
        bases = (trial for trial in before if not trial.mixture)
        return min(bases, key=lambda trial: (trial.error is not None, trial.index), default=None)

    def _as_proposed(self, trial: Trial, proposal: Proposal) -> Trial:
        return replace(
            trial,
            index=proposal.index,
            purpose=proposal.purpose,
            mixture=proposal.mixture,
            gradient=self._gradient(trial, proposal.mixture),
        )

    def _outward(self, proposal: Proposal) -> Proposal:
        local = proposal.index
        if local < self._beyond:
            place = self._own.index(local)
        else:
            place = len(self._own) + local - self._beyond
        index, purpose = self._first + place, proposal.purpose
        return replace(
            proposal,
            index=index,
            purpose=purpose if purpose == "base" and index == 0 else f"{self.name}/{purpose}",
            mixture=self.mixture(proposal.mixture),
        )

    def _inward(self, trial: Trial) -> Trial:
        place = trial.index - self._first
        if place < len(self._own):
            local = self._own[place]
        else:
            local = self._beyond + place - len(self._own)
        coordinates = self._coordinates(trial)
        return replace(
            trial,
            index=local,
            purpose=trial.purpose.removeprefix(f"{self.name}/"),
            mixture=coordinates,
            gradient=self._gradient(trial, coordinates),
        )

    def _coordinates(self, trial: Trial) -> dict[str, float]:
        """Return where a measured mixture lies in the frame.

        Raises:
            SearchError: it does not.
        """
        if not trial.mixture:
            return {}
        if set(trial.mixture) <= set(self._domains):
            mixture = to_vector(trial.mixture, self._domains)
            coordinates = self.frame.read(mixture)
            if abs(coordinates.sum() - 1) < SAME and is_same(
                self.frame.embed(coordinates), mixture
            ):
                return to_mixture(coordinates, self.frame.variables)
        shares = ", ".join(f"{name}: {share:.4g}" for name, share in trial.mixture.items())
        raise SearchError(
            f"Trial {trial.index} of the journal measured {{{shares}}}, which this stage cannot "
            "ask for. The journal belongs to other domains, tokens, bounds, or settings of search: "
            "restore them, or use another run_dir."
        )

    def _gradient(self, trial: Trial, coordinates: Mapping[str, float]) -> Gradient | None:
        """Return the slopes per coordinate of the frame, by the chain rule."""
        if trial.gradient is None or not coordinates:
            return trial.gradient
        at = to_vector(coordinates, self.frame.variables)

        def pulled_back(slope: Mapping[str, float]) -> dict[str, float]:
            vector = np.array([slope[name] for name in self._domains])
            return to_mixture(self.frame.pull_back(at, vector), self.frame.variables)

        slopes = {
            capability: {metric: pulled_back(slope) for metric, slope in metrics.items()}
            for capability, metrics in trial.gradient.slopes.items()
        }
        return replace(trial.gradient, slopes=slopes)
