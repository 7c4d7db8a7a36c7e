"""The search: ask for mixtures, merge, score, write down, learn. Read this first."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

from megatron_mergemix.distributed import broadcast_object, rank
from megatron_mergemix.errors import EvaluationError, SearchError
from megatron_mergemix.evaluate.evaluator import Evaluator
from megatron_mergemix.evaluate.proxy import Proxy
from megatron_mergemix.journal import Journal, Trial
from megatron_mergemix.search.strategy import Proposal, Strategy

logger = logging.getLogger(__name__)

_FAILURES_IN_A_ROW = 3

MergeWeights = Callable[[Mapping[str, float]], Mapping[str, float]]
"""Mixture over domains (empty: the base) -> merge weight per expert."""


def run_search(
    strategy: Strategy | None,
    journal: Journal | None,
    proxy: Proxy,
    evaluator: Evaluator,
    merge_weights: MergeWeights,
    report: Callable[[Trial], None] = lambda trial: None,
) -> None:
    """Collective: drive the strategy until it is done.

    Rank 0 asks and everyone gets it; all ranks merge and score; rank 0 writes the trial down
    before the next one starts. What the journal holds already is not measured again.

    Args:
        strategy: proposes mixtures; rank 0 only, None elsewhere.
        journal: where trials are kept; rank 0 only, None elsewhere.
        proxy: base and experts, resident; left at the base.
        evaluator: scores the proxy.
        merge_weights: from a mixture to the experts' weights.
        report: called on rank 0 with every new trial.

    Raises:
        SearchError: three candidates failed in a row, or the strategy asks for gradients.
    """
    failures = 0
    if strategy is not None and journal is not None:
        strategy.tell(journal.trials())
    while not broadcast_object(strategy is not None and strategy.done()):
        for proposal in broadcast_object(list(strategy.ask()) if strategy is not None else []):
            if proposal.needs_gradient:
                raise SearchError("this search measures scores only; no evaluator gives gradients.")
            trial = _measure(proposal, proxy, evaluator, merge_weights)
            failures = failures + 1 if trial.error else 0
            if journal is not None:
                journal.append(trial)
                report(trial)
            if failures == _FAILURES_IN_A_ROW:
                raise SearchError(
                    f"{failures} candidates failed in a row; the last: {trial.error} All are in "
                    "the journal. Mend the cause, move search/trials.jsonl in run_dir away and "
                    "start the search again; trained models stay."
                )
        if strategy is not None and journal is not None:
            strategy.tell(journal.trials())
    proxy.apply({})


def _measure(
    proposal: Proposal, proxy: Proxy, evaluator: Evaluator, merge_weights: MergeWeights
) -> Trial:
    """Collective: merge and score one mixture; a failure to score is a failed trial."""
    alpha = merge_weights(proposal.mixture)
    start = time.perf_counter()
    norm = proxy.apply(alpha)
    merged = time.perf_counter()
    error: str | None = None
    scores: Mapping = {}
    try:
        scores = evaluator.evaluate(proxy)
    except EvaluationError as caught:  # raised on every rank alike, by the evaluator's contract
        error = str(caught)
        if rank() == 0:
            logger.warning("trial %d failed: %s", proposal.index, error)
    return Trial(
        index=proposal.index,
        purpose=proposal.purpose,
        mixture=dict(proposal.mixture),
        merge_weights=dict(alpha),
        scores=scores,
        task_vector_norm=norm,
        seconds={"merge": merged - start, "evaluate": time.perf_counter() - merged},
        error=error,
    )
