"""Numbers of lm-eval as scores: values by its own aggregation, errors over documents."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from lm_eval.api.metrics import bits_per_byte, mean
from lm_eval.api.task import Task
from numpy.typing import NDArray

from megatron_mergemix.errors import ConfigError
from megatron_mergemix.evaluate.utility import OVERLAP
from megatron_mergemix.trials import Score

GOLD = "gold_bpb"
"""The bits per byte of the right answers, as the mean over documents."""

_DRAWS = 200
_DRAWS_OF_SLOW_ONES = 100
_SLOW = ("bleu", "chrf", "chrf++", "ter")
"""What lm-eval itself draws less often for."""

_OF_OVERLAP = re.compile(r"bleu(?!rt)|rouge|chrf|ter(?![a-z])")
"""How the names of such metrics begin: ``bleu_max``, ``rouge1``, ``chrf++``; BLEURT is none."""

_RATIO_UNITS = {"bits_per_byte": "bits/byte", GOLD: "bits/byte"}


def metric_name(metric: str, filter_name: str) -> str:
    """Return lm-eval's ``metric,filter``, and the metric alone where nothing is filtered."""
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def metrics_of(task: Task, has_gold: bool) -> list[str]:
    """Return the names of what a task measures, its first metric first."""
    filters = [each.name for each in task._filters]
    names = [metric_name(metric, each) for metric in task.aggregation() for each in filters]
    return [*names, GOLD] if has_gold else names


def wanted_metric(name: str, metrics: Sequence[str], wish: str | None) -> str:
    """Return which of a task's metrics the utility sees.

    Args:
        name: of the task.
        metrics: what it measures.
        wish: the setting ``metric``; None for the first one.

    Raises:
        ConfigError: the task has no such metric, or several filters of it.
    """
    if wish is None:
        return metrics[0]
    found = [metric for metric in metrics if metric == wish]
    found = found or [metric for metric in metrics if metric.split(",")[0] == wish]
    if len(found) == 1:
        return found[0]
    what = "has no metric" if not found else "has several filters of the metric"
    raise ConfigError(
        f"lm_eval.metric: the task {name} {what} {wish!r}, expected one of: {', '.join(metrics)}."
    )


def kind_of(task: Task, metric: str) -> tuple[bool, str]:
    """Return whether more of a metric, named as by :func:`metric_name`, is better, and its unit."""
    name = metric.split(",")[0]
    better = name != GOLD and task.higher_is_better().get(name) is not False
    return better, _unit(name)


def score_of(
    metric: str,
    values: Sequence[Any],
    aggregate: Callable[[Any], Any],
    higher_is_better: bool,
    counts: bool = True,
) -> Score | None:
    """Return the score of one metric over documents, None where it is not a finite number.

    The value is lm-eval's. Where it is a mean, the items are what the documents gave. Bits per
    byte are a ratio of sums; there the items are its linear approximation in every document
    (the delta method), whose mean is the ratio, so that two candidates can be compared document
    by document. Elsewhere there are no items, and the standard error is bootstrapped; not that of
    a slow metric which does not count.
    """
    value = _finite(aggregate, values)
    if value is None:
        return None
    items: NDArray[np.float64] | None = None
    if aggregate is mean:
        items = np.array([float(each) for each in values])
    elif aggregate is bits_per_byte:
        items = _linear_bits(np.array(values, dtype=np.float64), value)
    stderr = None
    if items is not None:
        stderr = _stderr(items)
    elif counts or metric.split(",")[0] not in _SLOW:
        stderr = _bootstrap(metric, values, aggregate)
    return Score(
        value=value,
        stderr=stderr,
        num_samples=len(values),
        unit=_unit(metric.split(",")[0]),
        higher_is_better=higher_is_better,
        # Seven digits are what fp32 probabilities carry; more would only make the journal longer.
        items=() if items is None else tuple(float(f"{item:.7g}") for item in items.tolist()),
    )


def gold_score(bits_per_byte_of_each: Sequence[float]) -> Score:
    """Return ``gold_bpb`` from the bits per byte of every document's right answer."""
    score = score_of(GOLD, bits_per_byte_of_each, mean, higher_is_better=False)
    assert score is not None
    return score


def _linear_bits(pairs: NDArray[np.float64], value: float) -> NDArray[np.float64]:
    """Return one number per ``(log-probability, bytes)`` whose mean is the ratio of the sums."""
    bits, sizes = -pairs[:, 0] / math.log(2.0), pairs[:, 1]
    return np.asarray(value + (bits - value * sizes) / sizes.mean())


def _finite(aggregate: Callable[[Any], Any], values: Sequence[Any]) -> float | None:
    """Return lm-eval's number; the perplexity of a candidate that is far off may overflow."""
    try:
        value = float(aggregate(list(values)))
    except (TypeError, ValueError, ArithmeticError):
        return None
    return value if math.isfinite(value) else None


def _stderr(items: NDArray[np.float64]) -> float | None:
    return float(items.std(ddof=1) / math.sqrt(len(items))) if len(items) > 1 else None


def _bootstrap(metric: str, values: Sequence[Any], aggregate: Callable[[Any], Any]) -> float | None:
    """Return the standard deviation of the aggregate over documents drawn with replacement.

    None where that is not known: of one document, or where a draw gives no finite number.
    """
    if len(values) < 2:
        return None
    draws = _DRAWS_OF_SLOW_ONES if metric.split(",")[0] in _SLOW else _DRAWS
    random = np.random.default_rng(1234)
    places = (random.integers(len(values), size=len(values)) for _ in range(draws))
    found = [_finite(aggregate, [values[place] for place in drawn]) for drawn in places]
    known = [value for value in found if value is not None]
    return float(np.std(known, ddof=1)) if len(known) == draws else None


def _unit(name: str) -> str:
    if name in _RATIO_UNITS:
        return _RATIO_UNITS[name]
    if name.startswith("acc") or name.endswith("_acc") or name == "exact_match":
        return "accuracy"
    if _OF_OVERLAP.match(name):
        return OVERLAP
    return "perplexity" if name.endswith("perplexity") else name
