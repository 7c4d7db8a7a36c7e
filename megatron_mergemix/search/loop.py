"""The search: ask for mixtures, merge, score, write down, learn. Read this first."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile

from megatron_mergemix.errors import EvaluationError, SearchError
from megatron_mergemix.evaluate.evaluator import Evaluator, NamesCandidates, Subsampled
from megatron_mergemix.evaluate.proxy import Proxy, Replicas
from megatron_mergemix.processes.distributed import broadcast_object
from megatron_mergemix.search.journal import Journal
from megatron_mergemix.search.slopes import MergeWeights, measure_gradient
from megatron_mergemix.search.strategy import Proposal, Strategy
from megatron_mergemix.search.waves import Divided, Waves
from megatron_mergemix.trials import Gradient, Scores, Trial

logger = logging.getLogger(__name__)


def run_search(
    strategy: Strategy | None,
    journal: Journal | None,
    proxy: Proxy,
    evaluator: Evaluator,
    merge_weights: MergeWeights,
    report: Callable[[Trial], None] = lambda trial: None,
    replicas: Replicas | None = None,
    divided: Divided = "auto",
    most_failures: int = 3,
) -> None:
    """Collective: drive the strategy until it is done.

    Rank 0 asks and everyone gets it; all ranks merge and score; rank 0 writes trials down in the
    order of asking. What the journal holds already is not measured again.

    Args:
        strategy: proposes mixtures; rank 0 only, None elsewhere.
        journal: where trials are kept; rank 0 only, None elsewhere.
        proxy: base and experts, resident; left at the base.
        evaluator: scores the proxy.
        merge_weights: from a mixture to the experts' weights.
        report: called on rank 0 with every new trial.
        replicas: of the proxy that the ranks hold; None for a single one.
        divided: what replicas divide among them, see :class:`Waves`.
        most_failures: this many failed candidates in a row end the search.

    Raises:
        SearchError: ``most_failures`` candidates failed in a row, counting those before a kill.
    """
    waves = Waves(partial(_measure, proxy, evaluator, merge_weights), replicas, divided)
    failures = 0
    if strategy is not None and journal is not None:
        strategy.tell(journal.trials())
        failures = _failures_before(journal.trials(), most_failures)
    failures = broadcast_object(failures)
    while not broadcast_object(strategy is not None and strategy.done()):
        asked = broadcast_object(list(strategy.ask()) if strategy is not None else [])
        for trial in waves.measure(asked):
            failures = failures + 1 if trial.error else 0
            if journal is not None:
                journal.append(trial)
                report(trial)
                if trial.error:
                    logger.warning("trial %d failed: %s", trial.index, trial.error)
            if failures == most_failures:
                raise SearchError(
                    f"{failures} candidates failed in a row; the last: {trial.error} All are in "
                    "the journal. Mend the cause and start the search again: it goes on after "
                    "them, or begins anew where search/trials.jsonl in run_dir was moved away; "
                    "trained models stay."
                )
        if strategy is not None and journal is not None:
            strategy.tell(journal.trials())
    proxy.apply({})


def _failures_before(trials: Sequence[Trial], most: int) -> int:
    """Return the length of the present run of failures; it begins anew where it ended a start."""
    at_end = takewhile(lambda trial: trial.error, reversed(trials))
    return sum(1 for _ in at_end) % most


def _measure(
    proxy: Proxy, evaluator: Evaluator, merge_weights: MergeWeights, proposal: Proposal
) -> Trial:
    """Collective: merge and score one mixture; a failure to score is a failed trial."""
    alpha = merge_weights(proposal.mixture)
    start = time.perf_counter()
    norm = proxy.apply(alpha)
    merged = time.perf_counter()
    error: str | None = None
    scores: Scores = {}
    if isinstance(evaluator, NamesCandidates):
        evaluator.begin(f"trial-{proposal.index:03d}")
    gradient: Gradient | None = None
    try:
        if proposal.needs_gradient:
            gradient = measure_gradient(proxy, evaluator, merge_weights, proposal)
        else:
            scores = _scores(proxy, evaluator, proposal)
    except EvaluationError as caught:  # raised on every rank alike, by the evaluator's contract
        error = str(caught)
    return Trial(
        index=proposal.index,
        purpose=proposal.purpose,
        mixture=dict(proposal.mixture),
        merge_weights=dict(alpha),
        scores=scores,
        gradient=gradient,
        task_vector_norm=norm,
        seconds={"merge": merged - start, "evaluate": time.perf_counter() - merged},
        error=error,
        first=proposal.first,
    )


def _scores(proxy: Proxy, evaluator: Evaluator, proposal: Proposal) -> Scores:
    """Collective: return the scores on those items that are asked for.

    Raises:
        EvaluationError: this candidate cannot be scored.
    """
    if proposal.is_whole:
        return evaluator.evaluate(proxy)
    assert isinstance(evaluator, Subsampled), f"{type(evaluator).__name__} cannot be subsampled"
    if proposal.begun is not None:
        return evaluator.evaluate_others(proxy, proposal.begun)
    return evaluator.evaluate_first(proxy)
