"""The rank-fidelity check: do proxies rank mixtures as models that are really trained on them do?

``validate/result.json`` holds what :func:`validation_result` returns:

``references``: one row per reference, the best really trained first: ``name``, ``mixture``,
``utility``, ``behind``, ``behind_stderr``, ``scores`` as
:func:`~megatron_mergemix.validation.references.comparison` gives them, ``proxy`` (``utility`` and
``scores`` of the merge for the same mixture) and ``predicted`` (by the surrogates that learned all
trials: ``utility``, the 95 % ``interval``, and ``intervals`` by level, and whether the mixture
``is_trial``, so that they had learned its score; None where there is no surface).

``fidelity``: ``overall`` and ``capabilities`` by name (what
:func:`~megatron_mergemix.validation.rank_fidelity.agreement` returns: of the utility, and of each
capability's score in its own unit, higher is better), ``surrogate`` (the same of the predicted
utility), ``top_k`` by k (``regret`` and its ``interval``), and of three sorts, by level, the share
of references that lie in the surrogate's intervals, counting the ``calibration_n`` that are no
trial of the search (uniform, proportional and learned mostly are: to hold what it has learned is no
feat of a surrogate); None where there are none:

- ``calibration``: the really trained utility. The intervals are meant for merges, which score
  worse or better than trained models all together, so it shows that as well.
- ``calibration_shifted``: the same after taking off the mean gap of all other references.
- ``calibration_of_merges``: the measured utility of the merge, which the intervals are meant for.

The intervals are those that the search reports: of the utility on new items where the trials kept
their items, so that on the search's own items, which both sides are scored on, they should hold
their share at least.

``costs``: see :func:`~megatron_mergemix.validation.costs.costs`. ``notes``: one sentence each.
``digests``: those of the search that all of it belongs to.

Intervals are ``[low, high]``. What is not defined is None, and a note says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_mergemix.config import Config
from megatron_mergemix.config.validation import LEAST_RANKED
from megatron_mergemix.errors import SearchError
from megatron_mergemix.evaluate.digests import objective
from megatron_mergemix.evaluate.utility import Scale, Utility
from megatron_mergemix.experiment.digests import search_digests
from megatron_mergemix.experiment.search_record import measured_trials
from megatron_mergemix.experiment.strategy import expert_ensemble
from megatron_mergemix.mixtures.simplex import to_vector
from megatron_mergemix.search.calibration import utility_scale
from megatron_mergemix.search.first_share import teaching
from megatron_mergemix.search.landscape import Landscape
from megatron_mergemix.search.make import bounds_of
from megatron_mergemix.search.uncertainty import Posterior
from megatron_mergemix.search.verdict import trial_of
from megatron_mergemix.training_runs.mixtures import train_tokens
from megatron_mergemix.trials import Scores, Trial, scores_of
from megatron_mergemix.validation.bootstrap import Resampled, resampled
from megatron_mergemix.validation.costs import costs
from megatron_mergemix.validation.rank_fidelity import (
    LEAST_INTERVAL,
    Array,
    agreement,
    coverage,
    top_k,
    without_offset,
)
from megatron_mergemix.validation.references import (
    comparison,
    proxy_record,
    scored_reference,
    values_of,
)

TOP_K = (1, 3, 5)
LEVELS = (0.5, 0.8, 0.95)
"""Of the surrogate's intervals whose calibration is reported."""

NUM_DRAWS = 4000
"""Of the surface, behind its intervals."""


def validation_result(config: Config) -> dict[str, Any]:
    """Return everything that references and their proxies tell; all of them are measured."""
    utility, trials = Utility(config.evaluate.utility, objective(config)), measured_trials(config)
    scale = utility_scale(utility, trials)
    rows = comparison(config)
    proxies, trained = _both_sides(config, [row["name"] for row in rows])
    for row, scores in zip(rows, proxies, strict=True):
        row["proxy"] = {
            "utility": utility.of_trial(scores, scale).value,
            "scores": values_of(utility, scores),
        }
        row["predicted"] = None
    notes = _predict(config, utility, scale, trials, rows)
    drawn = resampled(proxies, trained, utility, scale, config.validation.seed)
    fidelity = fidelity_of(rows, proxies, trained, utility, drawn)
    sides, missing = costs(config)
    if left_out := config.validation.leave_out:
        notes.append(f"Left out, as validation.leave_out says: {', '.join(left_out)}.")
    notes += [*_notes_on_ranks(utility, fidelity, drawn), *missing]
    return {
        "references": rows,
        "fidelity": fidelity,
        "costs": sides,
        "notes": notes,
        "digests": search_digests(config),
    }


def fidelity_of(
    rows: Sequence[dict[str, Any]],
    proxies: Sequence[Scores],
    trained: Sequence[Scores],
    utility: Utility,
    drawn: Resampled,
) -> dict[str, Any]:
    """Return the entry ``fidelity`` of the result.

    Args:
        rows: ``references`` of the result.
        proxies: scores of their proxies, in the order of the rows.
        trained: of the really trained models.
        utility: what is maximised.
        drawn: the bootstrap of both.
    """
    proxy = np.array([row["proxy"]["utility"] for row in rows])
    truth = np.array([row["utility"] for row in rows])
    sides = [
        np.array([utility.measure(scores)[0] for scores in side]) for side in (proxies, trained)
    ]
    found: dict[str, Any] = {
        "overall": agreement(proxy, truth, drawn.overall),
        "capabilities": {
            name: agreement(first, second, draws)
            for name, first, second, draws in zip(
                utility.capabilities, sides[0].T, sides[1].T, drawn.capabilities, strict=True
            )
        },
        "surrogate": None,
        "calibration_n": None,
        "top_k": {str(k): top_k(proxy, truth, k, drawn.overall) for k in TOP_K},
        "calibration": None,
        "calibration_shifted": None,
        "calibration_of_merges": None,
    }
    if all(row["predicted"] is not None for row in rows):
        predicted = np.array([row["predicted"]["utility"] for row in rows])
        on_items = np.broadcast_to(predicted, drawn.overall.trained.shape)
        draws = drawn.overall._replace(proxy=on_items)
        found["surrogate"] = agreement(predicted, truth, draws)
        found |= _calibrations(rows, proxy, truth, predicted)
    return found


def _both_sides(config: Config, names: Sequence[str]) -> tuple[list[Scores], list[Scores]]:
    proxies, trained = [], []
    for name in names:
        record, scores = proxy_record(config, name), scored_reference(config, name)
        assert record is not None, f"the proxy of {name} was scored by the validation job"
        assert scores is not None, f"{name} was scored by the validation job"
        proxies.append(scores_of(record["scores"]))
        trained.append(scores)
    return proxies, trained


def _predict(
    config: Config,
    utility: Utility,
    scale: Scale,
    trials: Sequence[Trial],
    rows: Sequence[dict[str, Any]],
) -> list[str]:
    """Add to each row what the surrogates say of its mixture; return why they say nothing."""
    domains, bounds = list(config.domains), bounds_of(config, train_tokens(config))
    usable = teaching(trials, domains, bounds)
    ensemble = expert_ensemble(config) if config.search.ensemble else None
    try:
        landscape = Landscape(usable, domains, utility, scale, "auto", ensemble)
    except SearchError as error:
        return [f"There is no predicted utility, so no calibration: {error}"]
    points = np.array([to_vector(row["mixture"], domains) for row in rows])
    rng = np.random.default_rng([config.validation.seed, 8])
    whole = [trial for trial in usable if trial.first is None]
    drawn = Posterior(landscape, whole, domains).sample(points, NUM_DRAWS, rng)
    for row, value, draws in zip(rows, landscape(points), drawn.T, strict=True):
        intervals = {
            str(level): np.percentile(draws, [50 * (1 - level), 50 * (1 + level)]).tolist()
            for level in LEVELS
        }
        row["predicted"] = {
            "utility": float(value),
            "interval": intervals["0.95"],
            "intervals": intervals,
            "is_trial": trial_of(to_vector(row["mixture"], domains), usable, domains) is not None,
        }
    return []


def _calibrations(
    rows: Sequence[dict[str, Any]], proxy: Array, truth: Array, predicted: Array
) -> dict[str, Any]:
    """Return how often intervals held what the surrogate had not learned, for every sort."""
    new = np.array([not row["predicted"]["is_trial"] for row in rows])
    found: dict[str, Any] = {"calibration_n": int(new.sum())}
    if new.any():
        counted = [row for row in rows if not row["predicted"]["is_trial"]]
        found["calibration"] = _calibration(counted, truth[new])
        found["calibration_of_merges"] = _calibration(counted, proxy[new])
        if len(rows) > 1:
            shifted = without_offset(truth, predicted)[new]
            found["calibration_shifted"] = _calibration(counted, shifted)
    return found


def _calibration(rows: Sequence[dict[str, Any]], values: Array) -> dict[str, float]:
    limits = {
        str(level): np.array([row["predicted"]["intervals"][str(level)] for row in rows])
        for level in LEVELS
    }
    return {level: coverage(values, *pair.T) for level, pair in limits.items()}


def _notes_on_ranks(utility: Utility, fidelity: dict[str, Any], drawn: Resampled) -> list[str]:
    """Return why numbers are missing, and what intervals leave out."""
    notes = []
    count = fidelity["overall"]["n"]
    if count < LEAST_RANKED:
        notes.append(
            f"A rank correlation needs at least {LEAST_RANKED} reference mixtures, there are "
            f"{count}: set validation.space_filling, such as 24."
        )
    else:
        parts = {"the utility": fidelity["overall"], **fidelity["capabilities"]}
        notes += [
            f"Of {name} there is no rank correlation: all proxies, or all trained models, score "
            "the same."
            for name, part in parts.items()
            if part["spearman"] is None
        ]
        if count < LEAST_INTERVAL:
            notes.append(
                f"Intervals need at least {LEAST_INTERVAL} reference mixtures, there are {count}: "
                "set validation.space_filling, such as 24."
            )
    if fidelity["calibration_n"] == 0:
        notes.append(
            "Every reference mixture is a trial of the search, so nothing tells how often the "
            "surrogate's intervals hold: set validation.space_filling, such as 24."
        )
    if large := [k for k, part in fidelity["top_k"].items() if part["regret"] is None]:
        notes.append(
            f"There is no regret of the best {', '.join(large)}: that is every reference there is."
        )
    if fixed := [name for name in utility.capabilities if name not in drawn.with_items]:
        notes.append(
            f"Intervals take the items of {', '.join(fixed)} as they are: single items are not "
            "kept, so only the choice of mixtures is in them."
        )
    return notes
