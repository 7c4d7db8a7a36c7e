"""Scores on the first share of the items, as what they would be on all items.

With ``search.first_share`` most candidates are scored on a share of the items alone, the same for
all of them. Those items may be easier or harder than the others, so such a score differs from one
on all items by more than noise. By how much is known from the candidates that were scored on all:
the mean difference between their score and that on the first share of their own items. As far as
that mean may be chance it is not believed (James and Stein's positive part).

What is left is noise, and the standard error of the score says how much: the noise of ``n`` items
of ``N`` is that of ``N`` times ``sqrt(N / n)``, whatever part of it all candidates have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_mergemix.mixtures.simplex import Bounds, to_vector, within
from megatron_mergemix.search.purposes import is_gradient
from megatron_mergemix.trials import Score, Scores, Trial

_Key = tuple[tuple[str, float], ...]


def on_all_items(trials: Sequence[Trial]) -> list[Trial]:
    """Return one trial per candidate, all with scores as on all items.

    A candidate that was scored on its first share and then on all items is the later trial, with
    the purpose of the first. Trials that are as on all items already stay as they are, so doing it
    again changes nothing. Failed trials are left out where any trial is on a first share.

    Args:
        trials: of one search, in any order.
    """
    partial = [trial for trial in trials if trial.first is not None and trial.error is None]
    if not partial:
        return list(trials)
    whole = [trial for trial in trials if trial.first is None and trial.error is None]
    purposes = {_key(trial): trial.purpose for trial in partial}
    done = {_key(trial) for trial in whole}
    raced = [replace(trial, purpose=purposes.get(_key(trial), trial.purpose)) for trial in whole]
    waiting = [trial for trial in partial if _key(trial) not in done]
    if not waiting:
        return raced
    begun = {_key(trial): trial.scores for trial in partial}
    pairs = [(begun.get(_key(trial)), trial.scores) for trial in whole if trial.mixture]
    return [*raced, *(replace(t, scores=_corrected(t.scores, pairs)) for t in waiting)]


def teaching(trials: Sequence[Trial], domains: Sequence[str], bounds: Bounds) -> list[Trial]:
    """Return what a finished search learned from: what scored a mixture within the bounds.

    One trial per candidate, as on all items.
    """
    scored = [t for t in trials if t.mixture and t.error is None and not is_gradient(t)]
    inside = [t for t in scored if within(to_vector(t.mixture, domains), bounds)]
    return on_all_items(inside)


def _key(trial: Trial) -> _Key:
    return tuple(sorted(trial.mixture.items()))


def _corrected(scores: Scores, pairs: Sequence[tuple[Scores | None, Scores]]) -> Scores:
    return {
        capability: {
            metric: _as_on_all(
                score,
                [
                    (None if begun is None else begun[capability].get(metric), whole)
                    for begun, all_scores in pairs
                    if (whole := all_scores.get(capability, {}).get(metric)) is not None
                ],
            )
            for metric, score in metrics.items()
        }
        for capability, metrics in scores.items()
    }


def _as_on_all(score: Score, pairs: Sequence[tuple[Score | None, Score]]) -> Score:
    """Return a score on a first share as on all items.

    Args:
        score: of one candidate.
        pairs: of others: their score on that share, where it was measured by itself, and on all.
    """
    count = max((whole.num_samples for _, whole in pairs), default=0)
    if score.num_samples >= count:
        return score  # a command, which cannot be split
    known = [_on_first(begun, whole, score.num_samples) for begun, whole in pairs]
    differences = [
        whole.value - first
        for first, (_, whole) in zip(known, pairs, strict=True)
        if first is not None
    ]
    offset = _more_than_chance(np.array(differences, dtype=np.float64))
    return replace(score, value=score.value + offset, num_samples=count, items=())


def _on_first(begun: Score | None, whole: Score, num: int) -> float | None:
    """Return what a candidate scored on its first items, None where nothing tells."""
    if len(whole.items) == whole.num_samples > num:
        return float(np.mean(whole.items[:num]))
    return None if begun is None else begun.value


def _more_than_chance(differences: np.ndarray) -> float:
    """Return the mean of the differences, as far as it is more than its standard error tells."""
    if len(differences) < 2:
        return 0.0
    mean = float(differences.mean())
    variance = float(differences.var(ddof=1)) / len(differences)
    return mean * max(0.0, 1.0 - variance / mean**2) if mean else 0.0
