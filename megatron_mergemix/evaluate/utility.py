"""From the scores of a trial to the number that is maximised.

Three steps, each usable alone: :meth:`Utility.measure` reads one oriented number per capability
(higher is better), :meth:`Utility.calibrate` fixes what 0 and 1 mean for each capability, and
:meth:`Utility.combine` makes one number of them. Arrays have a last axis of C capabilities, so
the same code serves measured trials and predictions on thousands of points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mergemix.config import evaluate as config_evaluate
from megatron_mergemix.errors import ConfigError, EvaluationError, SearchError
from megatron_mergemix.mixtures.simplex import Array
from megatron_mergemix.trials import Score, Scores

Objective = Mapping[str, Sequence[str]]
"""Capability -> the metrics that enter the utility, each by its name in the scores."""

OVERLAP = "overlap"
"""The unit of BLEU, ROUGE, chrF and TER, which most tasks count up to 100, some up to 1."""


class Scale(NamedTuple):
    """What a capability's number is measured against: ``(value - zero) / unit``, ``(C,)`` each."""

    zero: Array
    unit: Array


class Measured(NamedTuple):
    """One number with its standard error (None where unknown)."""

    value: float
    stderr: float | None


def objective_of(evaluate: config_evaluate.Evaluate) -> dict[str, tuple[str, ...]]:
    """Return which metrics of each capability enter the utility, as far as the settings tell.

    Those of ``lm_eval`` depend on its tasks (see :func:`.evaluate.digests.objective`); they are
    none here, which serves to plan a search, not to measure.
    """
    return {name: tuple(_metrics(each)) for name, each in evaluate.capabilities.items()}


def _metrics(capability: config_evaluate.Capability) -> Sequence[str]:
    if capability.loss is not None:
        return [capability.loss.metric]
    return capability.command.metrics if capability.command is not None else []


def check_scores(scores: Scores, objective: Objective) -> None:
    """Check that scores have what the utility needs, and that it can be averaged.

    Raises:
        EvaluationError: a capability or metric is missing or not finite.
        ConfigError: as :func:`check_kinds`.
    """
    for capability, metrics in objective.items():
        wanted = {metric: _score(scores, capability, metric) for metric in metrics}
        check_kinds(capability, {m: (s.higher_is_better, s.unit) for m, s in wanted.items()})


def check_kinds(capability: str, kinds: Mapping[str, tuple[bool, str]]) -> None:
    """Check that the metrics of one capability can be averaged.

    They must improve in one direction. Fractions of right answers under whatever name may be
    averaged, losses only in one unit, and overlaps of texts only with each other.

    Args:
        capability: its name.
        kinds: metric -> whether higher is better, and its unit.

    Raises:
        ConfigError: there is no common direction or unit.
    """
    found = {
        (higher_is_better, unit if unit == OVERLAP or not higher_is_better else ""): metric
        for metric, (higher_is_better, unit) in kinds.items()
    }
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise ConfigError(
            f"evaluate.capabilities.{capability} would be the mean of {first} "
            f"({_direction(*one)}) and {second} ({_direction(*other)}), which means nothing. "
            "Make capabilities of their own of them: evaluate.utility.normalize puts those on "
            "one scale."
        )


def _direction(higher_is_better: bool, unit: str) -> str:
    return f"{unit}, {'higher' if higher_is_better else 'lower'} is better".lstrip(", ")


def _score(scores: Scores, capability: str, metric: str) -> Score:
    """Return one score.

    Raises:
        EvaluationError: it is missing or not finite.
    """
    score = scores.get(capability, {}).get(metric)
    if score is None:
        known = ", ".join(scores.get(capability, {})) or "nothing"
        raise EvaluationError(
            f"The utility needs the metric {metric!r} of capability {capability!r}, but "
            f"the evaluation gave {known}."
        )
    if not np.isfinite(score.value):
        raise EvaluationError(
            f"{capability}.{metric} is {score.value}, expected a finite number: this model "
            "is broken (a merge by its merge weights), or what scored it is."
        )
    return score


class Utility:
    """The user's idea of a good model: ``evaluate.utility`` over the capabilities.

    Args:
        settings: kind, normalisation and weights, as the rules of the settings allow them.
        objective: the metrics of every capability; its order is the order of all arrays.
    """

    has_given_scale = False
    """Whether the scale was fixed elsewhere, by other trials than those that are calibrated on."""

    def __init__(self, settings: config_evaluate.Utility, objective: Objective) -> None:
        self.settings = settings
        self.objective = {name: tuple(metrics) for name, metrics in objective.items()}
        self.capabilities = tuple(self.objective)
        self.weights = np.array([settings.weight(name) for name in self.capabilities])

    def measure(self, scores: Scores) -> tuple[Array, Array]:
        """Return the oriented value and the standard error of every capability.

        A capability with several metrics is their mean, with independent errors.

        Returns:
            Two arrays ``(C,)``, higher is better; NaN is a standard error that is unknown.

        Raises:
            EvaluationError: a capability or metric is missing or not finite.
        """
        pairs = np.array([self._measure(scores, name) for name in self.capabilities])
        return pairs[:, 0], pairs[:, 1]

    def _measure(self, scores: Scores, capability: str) -> tuple[float, float]:
        metrics = self.objective[capability]
        assert metrics, f"which metrics {capability} has is not known; see evaluate/digests.py"
        values, variances = [], []
        for metric in metrics:
            score = _score(scores, capability, metric)
            values.append(score.value if score.higher_is_better else -score.value)
            variances.append(np.nan if score.stderr is None else score.stderr**2)
        return float(np.mean(values)), float(np.sqrt(np.sum(variances)) / len(metrics))

    def calibrate(self, values: Array, is_vertex: NDArray[np.bool_]) -> Scale:
        """Return what 0 and 1 mean for every capability, from the trials of the design.

        Args:
            values: measured trials ``(N, C)``.
            is_vertex: ``(N,)``, whether the trial is a vertex: a single expert, or the nearest
                to it that the bounds allow.

        Raises:
            SearchError: too few trials, or a capability that is the same in all of them; such a
                scale would turn its noise into the utility.
        """
        num_capabilities = len(self.capabilities)
        kind = self.settings.normalize
        if kind == "none":
            return Scale(np.zeros(num_capabilities), np.ones(num_capabilities))
        rows = values[is_vertex] if kind == "vertices" else values
        what = "vertices" if kind == "vertices" else "trials"
        if len(rows) < 2:
            raise SearchError(
                f"evaluate.utility.normalize: {kind} needs two successful {what}; got {len(rows)}."
            )
        zero = rows.min(axis=0) if kind == "vertices" else rows.mean(axis=0)
        unit = np.ptp(rows, axis=0) if kind == "vertices" else rows.std(axis=0)
        # A capability that does not count needs no scale.
        flat = (unit <= 1e-12 * np.maximum(1.0, np.abs(zero))) & (self.weights > 0)
        if flat.any():
            name = self.capabilities[int(np.argmax(flat))]
            raise SearchError(
                f"Capability {name!r} has the same score in all {len(rows)} {what}, so "
                f"evaluate.utility.normalize: {kind} has no scale for it. Give it the weight 0 in "
                "evaluate.utility.weights, or use normalize: none."
            )
        return Scale(zero, np.where(unit > 0, unit, 1.0))

    def combine(self, values: Array, scale: Scale) -> Array:
        """Return the utility ``(...,)`` of oriented capability values ``(..., C)``."""
        counted = self.weights > 0
        scaled = ((values - scale.zero) / scale.unit)[..., counted]
        if self.settings.kind == "worst":
            return np.asarray(scaled.min(axis=-1))
        return np.asarray(scaled @ (self.weights[counted] / self.weights.sum()))

    def of_trial(self, scores: Scores, scale: Scale) -> Measured:
        """Return the utility of one trial.

        The standard error takes capabilities as independent and the scale as exact; under
        ``worst`` it is that of the worst capability. It is None where a capability that counts
        has none.
        """
        values, stderrs = self.measure(scores)
        shares = self._shares(values, scale)
        counted = shares > 0
        stderr = float(np.linalg.norm((shares * stderrs / scale.unit)[counted]))
        return Measured(float(self.combine(values, scale)), None if np.isnan(stderr) else stderr)

    def difference(self, capability: str, scores: Scores, over: Scores) -> Measured:
        """Return by how much one trial exceeds another in one capability, in its own unit.

        The standard error is as in :meth:`gain`.
        """
        values = [self._measure(each, capability)[0] for each in (scores, over)]
        metrics = self.objective[capability]
        share = 1 / len(metrics)
        variances = [
            _difference_variance(scores[capability][m], over[capability][m], share, share)
            for m in metrics
        ]
        variance = sum(variances)
        return Measured(
            values[0] - values[1], None if np.isnan(variance) else float(np.sqrt(variance))
        )

    def gain(self, scores: Scores, over: Scores, scale: Scale) -> Measured:
        """Return by how much the utility of one trial exceeds that of another.

        Where both have their items, the standard error is that of the paired differences: what
        makes an item hard for all candidates does not count. Elsewhere it takes the two trials
        as independent. It is None where a needed standard error is unknown.
        """
        values, other_values = self.measure(scores)[0], self.measure(over)[0]
        shares, other_shares = self._shares(values, scale), self._shares(other_values, scale)
        variance = 0.0
        for index in np.flatnonzero((shares > 0) | (other_shares > 0)):
            name = self.capabilities[index]
            for metric in self.objective[name]:
                per_unit = scale.unit[index] * len(self.objective[name])
                variance += _difference_variance(
                    scores[name][metric],
                    over[name][metric],
                    shares[index] / per_unit,
                    other_shares[index] / per_unit,
                )
        value = float(self.combine(values, scale) - self.combine(other_values, scale))
        return Measured(value, None if np.isnan(variance) else float(np.sqrt(variance)))

    def slope(
        self, scores: Scores, slopes: Mapping[str, Mapping[str, Mapping[str, float]]], scale: Scale
    ) -> dict[str, float]:
        """Return the derivatives of the utility, by the name of what the scores depend on.

        Under ``worst`` they are those of the capability that is worst in these scores: a
        supergradient. A capability that does not count may be missing.

        Args:
            scores: at the point where they were derived.
            slopes: capability -> metric -> name -> derivative of the score.
            scale: of the utility.
        """
        counted = np.flatnonzero(self.weights > 0)
        values = np.zeros(len(self.capabilities))
        values[counted] = [self._measure(scores, self.capabilities[index])[0] for index in counted]
        shares = self._shares(values, scale) / scale.unit
        total: dict[str, float] = {}
        for index in np.flatnonzero(shares):
            name = self.capabilities[index]
            metrics = self.objective[name]
            for metric in metrics:
                sign = 1.0 if scores[name][metric].higher_is_better else -1.0
                for source, slope in slopes[name][metric].items():
                    share = float(sign * shares[index]) / len(metrics)
                    total[source] = total.get(source, 0.0) + share * slope
        return total

    def _shares(self, values: Array, scale: Scale) -> Array:
        """Return what a unit of each scaled capability adds to the utility at these values."""
        if self.settings.kind != "worst":
            return self.weights / self.weights.sum()
        counted = np.flatnonzero(self.weights > 0)
        scaled = ((values - scale.zero) / scale.unit)[counted]
        shares = np.zeros(len(values))
        shares[counted[np.argmin(scaled)]] = 1.0
        return shares


def _difference_variance(first: Score, second: Score, share: float, other_share: float) -> float:
    """Return the variance of ``share * first - other_share * second``, NaN where unknown."""
    if len(first.items) > 1 and len(first.items) == len(second.items):
        differences = share * np.array(first.items) - other_share * np.array(second.items)
        return float(differences.var(ddof=1) / len(differences))
    errors = [np.nan if score.stderr is None else score.stderr for score in (first, second)]
    return float((share * errors[0]) ** 2 + (other_share * errors[1]) ** 2)
