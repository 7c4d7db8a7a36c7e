"""A search level by level: the shares of groups, and the mixture inside each group.

Many domains have too many mixtures for one search, so they are searched in groups (MergeMix, arXiv
2601.17858, section 3.5). Each stage is a search of its own, by whatever ``search.strategy`` names,
over a few coordinates, see :mod:`megatron_mergemix.mixtures.levels`:

``top_down``: first ``coarse``, the shares of the groups, with the mixture inside each group
proportional to tokens. Then one group after the other: its mixture inside, with its share and all
other domains fixed at what is known by then.

``bottom_up``: first ``leaves``, every domain alone, which gives the scale of the utility. Then the
mixture inside each group, with that group alone. Then ``coarse``, the shares of the groups, each
with the mixture inside that was found for it. The merge that was best inside a group is its group
expert. It is never written to disk: merging is linear, so merging group experts with shares ``s``
is merging all experts with the products of ``s`` and the shares inside, and both are one pass.

In the end ``composed``: the composed mixture is measured beside the uniform and the proportional
one, if it was not, and beside the ``joint`` optimum. Stages see only their own trials, but those of
all stages together tell more about all domains: one surrogate is fitted to them and maximised
within all bounds. Where measurements are noisy it beats the composed mixture (half its regret on
synthetic benchmarks), because inside a group with a small share noise drowns what its domains do.
A verdict over all trials compares these two and the best mixture of the coarse stage.

All stages maximise one number: zero and unit of every capability are those of the first stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from megatron_mergemix import config
from megatron_mergemix.errors import ConfigError, SearchError
from megatron_mergemix.evaluate.utility import Utility
from megatron_mergemix.mixtures.levels import Between, Everything, Frame, Inside, Levels
from megatron_mergemix.mixtures.simplex import Array, dense_points, to_vector, uniform
from megatron_mergemix.search.calibration import utility_scale
from megatron_mergemix.search.design import anchors
from megatron_mergemix.search.landscape import Landscape
from megatron_mergemix.search.purposes import stage_of
from megatron_mergemix.search.selection import refined_argmax
from megatron_mergemix.search.stage import Listed, OnOneScale, Stage
from megatron_mergemix.search.staged import StagedRecommendation, evidence_of
from megatron_mergemix.search.strategy import Proposal, Recommendation, Strategy
from megatron_mergemix.search.verdict import Candidate, give_verdict
from megatron_mergemix.trials import Trial

MakeStrategy = Callable[..., Strategy]
"""Called as :func:`megatron_mergemix.search.make.make_strategy`."""

LEAST_SHARE = 0.01
"""A group with less moves the merged model by less than a hundredth of an expert, whatever is
inside; measurements would be noise."""

LEAST_FREEDOM = 0.01
"""A group inside which no share can move further is not searched."""


class Position(NamedTuple):
    """What is known between two stages.

    Attributes:
        inside: the mixture inside every group, see :meth:`Levels.compose`; ``(D,)``.
        point: the composed mixture ``(D,)``; None before the coarse stage.
        coarse: what the coarse stage found ``(D,)``; None before it.
        joint: the optimum of a surrogate of all trials ``(D,)``; None before the last stage.
    """

    inside: Array
    point: Array | None = None
    coarse: Array | None = None
    joint: Array | None = None


class Hierarchical:
    """A strategy made of strategies; see the module and ``search/strategy.py``.

    Args:
        make: makes the strategy of a stage.
        levels: the groups.
        utility: the number that is maximised.
        proportional: the mixture proportional to tokens ``(D,)``.
        settings: of the section ``search``.

    Raises:
        ConfigError: too few trials for a stage.
    """

    def __init__(
        self,
        make: MakeStrategy,
        levels: Levels,
        utility: Utility,
        proportional: Array,
        settings: config.Search,
    ) -> None:
        self._make, self._levels, self._utility = make, levels, utility
        self._proportional, self._settings = proportional, settings
        self.domains = levels.domains
        fine = [name for name, members in levels.members.items() if len(members) > 1]
        self._is_top_down = settings.hierarchy == "top_down"
        self._order = (
            ["coarse", *fine, "composed"]
            if self._is_top_down
            else ["leaves", *fine, "coarse", "composed"]
        )
        self._trials: tuple[Trial, ...] = ()
        self._skipped: dict[str, str] = {}
        self._failure: SearchError | None = None
        self._positions = [Position(inside=proportional)]
        self._check_stages()
        self._stages = [self._open(self._order[0], self._positions[0], [])]

    # ---- ask and tell ----

    def tell(self, trials: Sequence[Trial]) -> None:
        """Replace what is known by ``trials``: all finished trials of this search, any order.

        Raises:
            SearchError: a trial that these settings would not have asked for.
        """
        self._trials = tuple(sorted(trials, key=lambda trial: trial.index))
        for trial in self._trials:
            if trial.purpose != "base" and stage_of(trial.purpose) not in self._order:
                raise self._refusal(trial)
        for number, stage in enumerate(self._stages):
            before = stage.trials
            stage.tell(self._trials)
            if stage.trials != before:
                self._forget_after(number)
                break
        self._advance()
        if self._is_complete():
            for trial in self._trials:
                if not any(stage.owns(trial) for stage in self._stages):
                    raise self._refusal(trial)

    def ask(self) -> list[Proposal]:
        """Return the next proposals of the stage under way.

        Raises:
            SearchError: the journal holds trials of later stages that earlier ones, as they are
                now, would not have led to.
        """
        if self._failure is not None:
            return []
        asked = self._stages[-1].ask()
        wanted = {proposal.index for proposal in asked}
        for trial in self._trials:
            if trial.index in wanted:
                raise self._refusal(trial)
        return asked

    def done(self) -> bool:
        """Return whether all stages are measured, or one failed."""
        return not self.ask()

    # ---- stages ----

    def _forget_after(self, number: int) -> None:
        """Drop the stages that were opened in the light of other trials."""
        del self._stages[number + 1 :]
        del self._positions[number + 1 :]
        reached = self._order.index(self._stages[-1].name)
        self._skipped = {
            name: why for name, why in self._skipped.items() if self._order.index(name) < reached
        }

    def _advance(self) -> None:
        """Open stages for as long as all the opened ones are measured."""
        self._failure = None
        while self._stages[-1].done() and not self._is_complete():
            before = [trial for stage in self._stages for trial in stage.trials]
            try:
                position = self._position_after(self._stages[-1])
                name = self._next_stage(position)
                if name == "composed":
                    position = position._replace(joint=self._joint(before))
            except SearchError as error:
                self._failure = error
                return
            stage = self._open(name, position, before)
            stage.tell(self._trials)
            self._stages.append(stage)
            self._positions.append(position)

    def _is_complete(self) -> bool:
        return self._stages[-1].name == self._order[-1] and self._stages[-1].done()

    def _next_stage(self, position: Position) -> str:
        reached = self._order.index(self._stages[-1].name)
        for name in self._order[reached + 1 :]:
            frame = self._frame(name, position)
            why = _reason_to_skip(frame) if isinstance(frame, Inside) else None
            if why is None:
                return name
            self._skipped[name] = why
        raise AssertionError("the last stage is never skipped")

    def _position_after(self, stage: Stage) -> Position:
        """Return what is known when a stage is measured.

        Raises:
            SearchError: too few of its trials succeeded.
        """
        position = self._positions[-1]
        if stage.name == "leaves":
            failed = [trial for trial in stage.trials if trial.mixture and trial.error]
            if 2 * len(failed) > len(stage.trials) - 1:
                raise SearchError(
                    f"search.hierarchy, stage leaves: {len(failed)} of {len(stage.trials) - 1} "
                    f"trials failed; at least half must succeed. The first, trial "
                    f"{failed[0].index}: {failed[0].error} Mend the cause, and begin a search in "
                    "another run_dir."
                )
            return position
        advice = stage.recommend().mixture
        if stage.name != "coarse" and not self._is_top_down:
            inside = position.inside.copy()
            inside[self._levels.members[stage.name]] = to_vector(advice, stage.frame.variables)
            return position._replace(inside=inside)
        point = to_vector(stage.mixture(advice), self.domains)
        coarse = point if stage.name == "coarse" else position.coarse
        return position._replace(point=point, coarse=coarse)

    def _open(self, name: str, position: Position, before: Sequence[Trial]) -> Stage:
        """Return a stage that knows no trials of its own yet."""
        frame = self._frame(name, position)
        strategy: Strategy
        if name in ("leaves", "composed"):
            strategy = Listed(self._listed(name, position), self.domains)
        else:
            utility = self._utility
            if before:
                utility = OnOneScale(utility, utility_scale(utility, before))
            strategy = self._strategy(name, frame, utility)
        return Stage(name, strategy, frame, self.domains, before)

    def _strategy(self, name: str, frame: Frame, utility: Utility) -> Strategy:
        settings = self._settings
        trials = settings.trials if name == "coarse" else settings.trials_in_group(name)
        changes = {"trials": trials, "hierarchy": None}
        return self._make(
            settings.model_copy(update=changes),
            domains=frame.variables,
            utility=utility,
            bounds=frame.bounds,
            proportional=frame.proportional,
        )

    def _frame(self, name: str, position: Position) -> Frame:
        levels, proportional = self._levels, self._proportional
        if name in ("leaves", "composed"):
            return Everything(levels, proportional)
        if name == "coarse":
            return Between(levels, position.inside, proportional)
        around = position.point
        if around is None:
            around = levels.alone(name, position.inside)
        return Inside(levels, name, around, proportional)

    def _listed(self, name: str, position: Position) -> list[tuple[str, Array]]:
        priors = [(f"prior:{name}", point) for name, point in self._priors().items()]
        if name == "leaves":
            return anchors(self._levels.corners(), priors)
        assert position.point is not None, "the coarse stage comes before the composed one"
        assert position.joint is not None
        found = [("verify:composed", position.point), ("verify:joint", position.joint)]
        return [*priors, *found]

    def _landscape(self, trials: Sequence[Trial]) -> Landscape:
        """Return what successful trials of all stages say about all domains."""
        scale = utility_scale(self._utility, self._trials)
        usable = [trial for trial in trials if trial.mixture and trial.error is None]
        return Landscape(usable, self.domains, self._utility, scale, "auto")

    def _joint(self, trials: Sequence[Trial]) -> Array:
        """Return the mixture within all bounds of which all trials together expect most."""
        landscape, levels = self._landscape(trials), self._levels
        rng = np.random.default_rng([self._settings.seed, 4])
        measured = [to_vector(t.mixture, self.domains) for t in trials if t.mixture]
        spread = levels.project(dense_points(levels.bounds, rng))
        points = np.concatenate([spread, np.array(measured)])
        return refined_argmax(
            landscape, points, landscape(points), levels.bounds, rng, levels.project
        )

    def _priors(self) -> dict[str, Array]:
        return {
            "uniform": self._levels.project(uniform(len(self.domains))),
            "proportional": self._levels.project(self._proportional),
        }

    def _check_stages(self) -> None:
        """Try every stage, because those that come later must not fail for their settings."""
        for name in self._order[:-1]:
            frame = self._frame(name, self._positions[0])
            if name == "leaves" or (isinstance(frame, Inside) and _reason_to_skip(frame)):
                continue
            try:
                self._strategy(name, frame, self._utility)
            except ConfigError as error:
                setting = "trials" if name == "coarse" else "group_trials"
                raise ConfigError(
                    f"search.hierarchy, stage {name}, whose trials search.{setting} gives: {error}"
                ) from error

    def _refusal(self, trial: Trial) -> SearchError:
        return SearchError(
            f"Trial {trial.index} of the journal ({trial.purpose}) is none that search.hierarchy: "
            f"{self._settings.hierarchy} asks for after the trials before it. The journal belongs "
            "to other groups, or settings of search: restore them, or use another run_dir."
        )

    # ---- recommend ----

    def recommend(self) -> Recommendation:
        """Return the composed mixture, or what the trials of all stages speak for instead of it.

        Raises:
            SearchError: the stages are not finished, or more than half of the trials of one failed.
        """
        if self._failure is not None:
            raise self._failure
        if not self._is_complete():
            raise SearchError(
                f"stage {self._stages[-1].name} of search.hierarchy is not measured yet; continue "
                "the search before asking for its result."
            )
        position = self._positions[-1]
        assert position.point is not None
        assert position.coarse is not None
        assert position.joint is not None
        candidates = [
            Candidate("composed", "verify:composed", position.point),
            Candidate("joint", "verify:joint", self._measured_joint(position.joint)),
            Candidate("coarse", "verify:argmax", position.coarse),
        ]
        verdict = give_verdict(
            candidates,
            self._priors(),
            list(self._trials),
            self.domains,
            self._levels.bounds,
            self._landscape([t for stage in self._stages[:-1] for t in stage.trials]),
        )
        return StagedRecommendation(
            **{**vars(verdict), "notes": [*self._notes(), *verdict.notes]},
            stages=[self._evidence(name) for name in self._order[:-1]],
        )

    def _measured_joint(self, planned: Array) -> Array:
        """Return the joint optimum as the journal has it, if it has it."""
        for trial in self._stages[-1].trials:
            if trial.purpose == "composed/verify:joint":
                return to_vector(trial.mixture, self.domains)
        return planned

    def _evidence(self, name: str) -> dict[str, Any]:
        if name in self._skipped:
            variables = [self.domains[place] for place in self._levels.members[name]]
            return {"stage": name, "variables": variables, "skipped": self._skipped[name]}
        return evidence_of(next(stage for stage in self._stages if stage.name == name))

    def _notes(self) -> list[str]:
        notes = [
            f"The mixture inside {name} was not searched: {why}"
            for name, why in self._skipped.items()
        ]
        if self._levels.are_bounded:
            notes.append(
                "Where mixtures that are as good within noise are counted, those count too that "
                "only the bounds of groups forbid."
            )
        return notes


def _reason_to_skip(frame: Inside) -> str | None:
    """Return why there is nothing to find inside a group, or None."""
    if frame.total < LEAST_SHARE:
        return (
            f"the group has the share {frame.total:.2g}, and below {LEAST_SHARE:g} no measurement "
            "can tell; it stays as tokens and bounds have it."
        )
    if frame.freedom < LEAST_FREEDOM:
        return (
            f"at the share {frame.total:.2g} bounds and max_epochs leave its domains no room to "
            "move."
        )
    return None
