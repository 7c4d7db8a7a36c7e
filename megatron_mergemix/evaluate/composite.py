"""One evaluator for all capabilities, whatever kinds they are of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from megatron_mergemix.errors import SearchError
from megatron_mergemix.evaluate.evaluator import NamesCandidates, Slopes, SplitEvaluator, Subsampled
from megatron_mergemix.evaluate.loss import LossEvaluator
from megatron_mergemix.evaluate.proxy import DifferentiableProxy, Proxy
from megatron_mergemix.evaluate.utility import Objective, check_scores
from megatron_mergemix.trials import Minibatch, Scores


class Part(SplitEvaluator, Subsampled, Protocol):
    """The evaluator of one kind."""


class CompositeEvaluator:
    """Joins the scores of one evaluator per kind, in the order of the capabilities.

    Args:
        objective: the metrics of every capability; its order is that of the scores.
        loss: scores the held-out losses; None where there are none.
        others: evaluators of the other kinds, asked after it, the slowest last.
    """

    def __init__(
        self, objective: Objective, loss: LossEvaluator | None, others: Sequence[Part]
    ) -> None:
        self._objective = objective
        self._loss = loss
        self._parts: list[Part] = [*([loss] if loss is not None else []), *others]

    @property
    def kept_tokens(self) -> int:
        """Return of how many tokens of a text models keep keys and values at most."""
        return max((getattr(part, "kept_tokens", 0) for part in self._parts), default=0)

    def begin(self, name: str) -> None:
        """Say what the next candidate is called, to those that keep files of it."""
        for part in self._parts:
            if isinstance(part, NamesCandidates):
                part.begin(name)

    def evaluate(self, proxy: Proxy) -> Scores:
        """Collective: return the scores of all capabilities.

        The first kind that cannot score the candidate spares the others the work.

        Raises:
            EvaluationError: the candidate cannot be scored, or a metric of the utility is missing.
            ConfigError: a capability averages what has no common direction or unit.
        """
        return self._checked(lambda part: part.evaluate(proxy))

    def _checked(self, evaluate: Callable[[Part], Scores]) -> Scores:
        found: dict[str, Mapping] = {}
        for part in self._parts:
            found |= evaluate(part)
        check_scores(found, self._objective)
        return {name: found[name] for name in self._objective}

    def evaluate_first(self, proxy: Proxy) -> Scores:
        """Collective: return the scores on the first share of the items of all capabilities.

        Raises:
            EvaluationError: as :meth:`evaluate`.
        """
        return self._checked(lambda part: part.evaluate_first(proxy))

    def evaluate_others(self, proxy: Proxy, first: Scores) -> Scores:
        """Collective: return the scores on all items, of a candidate that has its first ones.

        Raises:
            EvaluationError: as :meth:`evaluate`.
        """
        return self._checked(lambda part: part.evaluate_others(proxy, first))

    def evaluate_held_out(self, proxy: Proxy) -> Scores:
        """Collective: return the scores on items that :meth:`evaluate` never scores.

        Raises:
            EvaluationError: the candidate cannot be scored.
        """
        found: dict[str, Mapping] = {}
        for part in self._parts:
            found |= part.evaluate_held_out(proxy)
        return {name: found[name] for name in self._objective if name in found}

    def gradients(self, proxy: DifferentiableProxy, minibatch: Minibatch) -> tuple[Scores, Slopes]:
        """Collective: differentiate held-out losses; see ``evaluate/evaluator.py``.

        Raises:
            EvaluationError: a loss is not finite.
            SearchError: there is no held-out loss.
        """
        return self._losses().gradients(proxy, minibatch)

    def token_log_likelihoods(self, proxy: Proxy) -> dict[str, np.ndarray]:
        """Collective: return what the model says of every held-out token, of losses alone.

        Raises:
            EvaluationError: a log-likelihood is not finite.
            SearchError: there is no held-out loss.
        """
        return self._losses().token_log_likelihoods(proxy)

    def _losses(self) -> LossEvaluator:
        if self._loss is None:
            raise SearchError(
                "no capability is a held-out loss, and nothing else has probabilities of tokens. "
                "Give a capability that counts a loss, or use another search.strategy and no "
                "search.ensemble."
            )
        return self._loss
