"""A gradient as a trial: measured in merge weights, written down in shares of domains."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from megatron_mergemix.evaluate.evaluator import DifferentiableEvaluator, Evaluator, Slopes
from megatron_mergemix.evaluate.proxy import DifferentiableProxy, Proxy
from megatron_mergemix.search.strategy import Proposal
from megatron_mergemix.trials import Gradient

MergeWeights = Callable[[Mapping[str, float]], Mapping[str, float]]
"""Mixture over domains (empty: the base) -> merge weight per expert."""


def measure_gradient(
    proxy: Proxy, evaluator: Evaluator, merge_weights: MergeWeights, proposal: Proposal
) -> Gradient:
    """Collective: differentiate the scores of the live merge by the shares of the domains.

    Raises:
        EvaluationError: this candidate cannot be scored.
        SearchError: there is no held-out loss.
    """
    assert isinstance(evaluator, DifferentiableEvaluator)
    assert isinstance(proxy, DifferentiableProxy)
    assert proposal.minibatch is not None
    scores, slopes = evaluator.gradients(proxy, proposal.minibatch)
    return Gradient(proposal.minibatch, scores, by_shares(slopes, proposal.mixture, merge_weights))


def by_shares(
    slopes: Slopes, domains: Mapping[str, float], merge_weights: MergeWeights
) -> dict[str, dict[str, dict[str, float]]]:
    """Return derivatives by merge weights as derivatives by shares of the domains.

    Merge weights are linear in the mixture, ``alpha = lambda @ inv(M)``, so the row of a domain in
    the Jacobian is what stands for that domain alone.
    """
    rows = {name: merge_weights({**dict.fromkeys(domains, 0.0), name: 1.0}) for name in domains}
    return {
        capability: {
            metric: {
                name: sum(weight * slope[expert] for expert, weight in row.items())
                for name, row in rows.items()
            }
            for metric, slope in metrics.items()
        }
        for capability, metrics in slopes.items()
    }
