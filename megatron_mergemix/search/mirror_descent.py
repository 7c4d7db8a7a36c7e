"""Mirror descent on the utility: follow dU/dlambda through the merge.

1. Every domain alone, the uniform and the proportional mixture are scored on all items: they fix
   the scale of the utility, and the better one of the latter two is the start.
2. ``search.steps`` times the utility is differentiated on a minibatch and the mixture moved by
   exponentiated gradient, the mirror descent of the simplex (Kivinen and Warmuth, 1997; Beck and
   Teboulle, 2003), back into the bounds by the KL projection. Nothing is kept between steps but
   the trials: no optimizer state.
3. The last mixture and the mean of the later half of them are scored on all items. The mean wins
   unless a mixture that was scored is surely better.

A gradient of the shares of D domains costs a backward pass, about two forward passes, however
large D is; a surrogate of second order needs some D^2 / 2 trials.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_mergemix.evaluate.utility import Scale
from megatron_mergemix.mixtures.simplex import Array, Bounds, project, to_vector, uniform
from megatron_mergemix.search.calibration import utility_scale
from megatron_mergemix.search.design import design
from megatron_mergemix.search.landscape import Landscape
from megatron_mergemix.search.purposes import is_gradient, kind_of
from megatron_mergemix.search.rounds import RoundStrategy
from megatron_mergemix.search.verdict import Candidate
from megatron_mergemix.trials import Minibatch, Trial

MIXED_IN = 0.1
"""Of the uniform mixture, at the start: a share that is 0 stays 0."""

LARGEST_CHANGE = np.log(4.0)
"""Of the logarithm of a share in one step: gradients of a handful of windows may lie."""


class MirrorDescent(RoundStrategy):
    """One gradient per round; see the module and :class:`RoundStrategy`."""

    favourite = "mean"
    """Gradients led there, of which a surrogate that was fitted to a few scores knows nothing."""

    def plan_round(self, number: int, trials: Sequence[Trial]) -> list[tuple[str, Array]]:
        """Return the mixtures that fix the scale, then one mixture per round to differentiate."""
        num = self._size_of_design()
        if number == 0:
            return design(self.bounds, self.proportional, num, self.settings.seed)
        if number > self.settings.steps:
            return []
        return [(f"gradient:{number}", project(self._iterates(trials)[-1], self.bounds))]

    def minibatch(self, purpose: str) -> Minibatch | None:
        """Return the windows of a gradient, of the capabilities that count."""
        kind, _, number = kind_of(purpose).partition(":")
        if kind != "gradient":
            return None
        names, weights = self.utility.capabilities, self.utility.weights
        counted = tuple(n for n, weight in zip(names, weights, strict=True) if weight > 0)
        return Minibatch(int(number) - 1, self.settings.minibatch, self.settings.seed, counted)

    def setting_of_first_fit(self) -> None:
        """Return nothing: the number of domains decides."""

    def _size_of_design(self) -> int:
        """Return what a Gaussian process needs at least, and one more, which may fail."""
        return len(self.domains) + 3

    def candidates(self, landscape: Landscape) -> list[Candidate]:
        """Return where the descent ended, and the mean of its later half."""
        iterates = self._iterates(self._explored(failed=False))
        later = iterates[len(iterates) // 2 :]
        return [
            Candidate("last", "verify:last", project(iterates[-1], self.bounds)),
            Candidate("mean", "verify:mean", project(np.mean(later, axis=0), self.bounds)),
        ]

    def _iterates(self, trials: Sequence[Trial]) -> Array:
        """Return the mixtures of the descent, the next one included, ``(T + 1, D)``.

        The step follows from the gradients alone: ``step_length`` over the root of the sum of
        their squared norms so far (AdaGrad with one number; Streeter and McMahan, 2010), each
        in the local norm of the simplex, ``sum_d lambda_d h_d^2`` with ``h`` the gradient along
        the simplex. So it fits any unit of the utility, shrinks while gradients are noise, and
        stays where they vanish by themselves.
        """
        scored = [trial for trial in trials if not is_gradient(trial)]
        scale = utility_scale(self.utility, scored)
        at, squares = self._start(scored, scale), 0.0
        path = [at]
        for trial in filter(is_gradient, trials):
            assert trial.gradient is not None, "failed trials are not among them"
            slope = self.utility.slope(trial.gradient.scores, trial.gradient.slopes, scale)
            measured_at = to_vector(trial.mixture, self.domains)
            gradient = np.array([slope[name] for name in self.domains])
            gradient += self.preference.slope(measured_at)
            along = gradient - at @ gradient
            squares += float(at @ along**2)
            if squares > 0:
                step = self.settings.step_length / np.sqrt(squares)
                factors = np.exp(np.clip(step * along, -LARGEST_CHANGE, LARGEST_CHANGE))
                at = nearest_by_divergence(at * factors, self.bounds)
            path.append(at)
        return np.array(path)

    def _start(self, scored: Sequence[Trial], scale: Scale) -> Array:
        tried = [trial for trial in scored if kind_of(trial.purpose) != "vertex"] or scored
        points = np.array([to_vector(trial.mixture, self.domains) for trial in tried])
        observed = [self.utility.of_trial(trial.scores, scale).value for trial in tried]
        best = points[int(np.argmax(observed + self.preference(points)))]
        mixed = (1 - MIXED_IN) * best
        return nearest_by_divergence(mixed + MIXED_IN * uniform(len(self.domains)), self.bounds)


def nearest_by_divergence(point: Array, bounds: Bounds) -> Array:
    """Return the mixture within the bounds of least ``KL(mixture || point)``.

    It is ``clip(c * point, low, high)`` for the one factor ``c`` that makes the sum 1. The sum is
    piecewise linear and increasing in ``c`` with a kink where a coordinate meets a bound.

    Args:
        point: ``(D,)``, positive but where ``high`` is 0; its sum does not matter.
        bounds: without their floor, which is for mixtures that are recommended.
    """
    positive = np.where(point > 0, point, 1.0)  # a domain that may have no share has none
    kinks = np.unique(np.concatenate([bounds.low / positive, bounds.high / positive]))
    sums = np.clip(kinks[:, None] * point, bounds.low, bounds.high).sum(axis=1)
    factor = float(np.interp(1.0, sums, kinks))
    nearest = np.clip(factor * point, bounds.low, bounds.high)
    return project(nearest, bounds._replace(floor=0.0))
