"""A diagnosis: what it measures, how that is kept on record, what follows from it. No torch.

Ranks measure (``jobs/diagnose.py``) and put numbers on record as they come; everything that can be
computed from them is computed again whenever it is shown, since the learned mixture may be new.

A loss is measured for every held-out loss among the capabilities, and for every domain that none
of them is named after, on that domain's own training data: the theory is about the losses that
experts were trained on. Its windows are dealt out to the datasets of a domain by their tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from megatron_mergemix import __version__
from megatron_mergemix.config import Config
from megatron_mergemix.config.evaluate import LossTask
from megatron_mergemix.config.groups import bounded_levels
from megatron_mergemix.data.indexed import IndexedDataset
from megatron_mergemix.diagnosis.regime import verdict
from megatron_mergemix.diagnosis.second_order import (
    Comparison,
    Expansion,
    Gap,
    compare,
    expansion_error,
    gaps,
    points_of,
    relative_curvatures,
)
from megatron_mergemix.diagnosis.task_vectors import (
    cosines,
    norms,
    norms_along_simplex,
    norms_of_mixtures,
)
from megatron_mergemix.evaluate.windows import loss_digest
from megatron_mergemix.experiment.digests import checkpoint_digests, model_digests
from megatron_mergemix.experiment.search_record import search_result
from megatron_mergemix.files.publishing import publish_json
from megatron_mergemix.mixtures import simplex
from megatron_mergemix.mixtures.merge_weights import merge_weights
from megatron_mergemix.mixtures.simplex import Array
from megatron_mergemix.model_facts import model_facts
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.search.make import bounds_of
from megatron_mergemix.training_runs.mixtures import (
    component_matrix,
    components,
    named_mixture,
    train_tokens,
)

WINDOWS = 64
"""At most so many windows of a loss: each takes ``1 + 4 K`` backward passes."""


# ---- what is measured ----


def diagnosed_losses(config: Config) -> dict[str, LossTask]:
    """Return the task of every loss that is measured, by capability or domain; see the module."""
    length = model_facts(config).seq_length
    tasks = {
        name: task.model_copy(update={"sequences": min(task.sequences, WINDOWS)})
        for name, task in config.evaluate.losses.items()
    }
    for name, domain in config.domains.items():
        if name not in tasks:
            prefixes = list(domain.prefixes)
            held = sum((IndexedDataset(prefix).num_tokens - 1) // length for prefix in prefixes)
            tasks[name] = LossTask(prefixes=prefixes, sequences=max(1, min(held, WINDOWS)))
    return tasks


def source_of(config: Config, name: str) -> str:
    """Return what the loss of this name is measured on."""
    return "held-out data" if name in config.evaluate.losses else "training data"


def diagnosis_digests(config: Config) -> dict[str, str]:
    """Return what a diagnosis depends on, by name."""
    return {**checkpoint_digests(config), **diagnosed_settings(config), "code": __version__}


def diagnosed_settings(config: Config) -> dict[str, str]:
    """Return what a diagnosis depends on besides base and experts; opens no checkpoint.

    Raises:
        DataError: a dataset is missing.
    """
    digests = {}
    for name, mixture in components(config).items():
        digests[f"component.{name}"] = json.dumps({d: round(s, 12) for d, s in mixture.items()})
    length = model_facts(config).seq_length
    for name, task in diagnosed_losses(config).items():
        digests[f"loss.{name}"] = loss_digest(task, length)
    return {**digests, **model_digests(config)}


# ---- on record ----


def on_record(config: Config) -> dict[str, Any] | None:
    """Return what was measured for these very settings and checkpoints, whole or in part."""
    path = RunDir(config.run_dir).diagnosis_measured
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    return record if record["digests"] == diagnosis_digests(config) else None


def is_complete(config: Config, record: Mapping[str, Any] | None) -> bool:
    """Return whether every loss was measured."""
    return record is not None and set(diagnosed_losses(config)) <= set(record["losses"])


def publish_measured(config: Config, record: Mapping[str, Any]) -> None:
    """Put on record what was measured so far; rank 0 only."""
    publish_json(RunDir(config.run_dir).diagnosis_measured, record)


# ---- what follows ----


def diagnosis_of(config: Config, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the whole diagnosis as JSON values, from what is on record.

    Returns:
        ``cosines`` and ``norms`` of task vectors, ``delta``, ``applied_norm`` of the proxies of
        named mixtures, ``applied_norm_along`` the simplex, ``curvature`` by loss, ``verdict``, and
        which mixture was ``learned``, None before the search is over.
    """
    products, matrix = np.array(record["products"]), component_matrix(config)
    result = search_result(config)
    learned = None if result is None else result["mixture"]
    mixtures = _named_mixtures(config, learned)
    curvature = _curvatures(config, record, matrix, mixtures)
    judged = verdict(
        matrix=matrix,
        general_share=config.experts.general_share,
        experts=config.expert_names,
        delta=record["delta"],
        losses=curvature,
    )
    return {
        "experts": list(config.expert_names),
        "domains": list(config.domains),
        "learned": learned,
        "cosines": cosines(products).tolist(),
        "norms": norms(products).tolist(),
        "base_norm": record["base_norm"],
        "delta": record["delta"],
        "applied_norm": norms_of_mixtures(products, matrix, mixtures),
        "applied_norm_along": norms_along_simplex(products, matrix, list(config.domains)),
        "curvature": curvature,
        "verdict": asdict(judged),
        "digests": record["digests"],
        "version": __version__,
    }


def _named_mixtures(config: Config, learned: Mapping[str, float] | None) -> dict[str, Array | None]:
    """Return uniform, proportional and learned ``(D,)``; the last is None before a search."""
    domains = list(config.domains)
    found: dict[str, Array | None] = {
        name: simplex.to_vector(named_mixture(config, name), domains)
        for name in ("uniform", "proportional")
    }
    return {**found, "learned": None if learned is None else simplex.to_vector(learned, domains)}


def _curvatures(
    config: Config,
    record: Mapping[str, Any],
    matrix: Array,
    mixtures: Mapping[str, Array | None],
) -> dict[str, dict[str, Any]]:
    domains = list(config.domains)
    lengths = norms(np.array(record["products"]))
    expansions = {name: _expansion(loss) for name, loss in record["losses"].items()}
    of_domains = dict(
        zip(domains, gaps([expansions[d].second_order for d in domains], matrix), strict=True)
    )
    bounds = bounds_of(config, train_tokens(config))
    points = points_of(bounds, matrix, bounded_levels(config, bounds))
    found = {}
    for name, measured in record["losses"].items():
        expansion, gap = expansions[name], of_domains.get(name)
        alpha, seen = np.array(measured["merges"]["alpha"]), np.array(measured["merges"]["losses"])
        gamma = None
        if gap is not None:
            own = int(np.argmax(matrix[:, domains.index(name)]))
            gamma = relative_curvatures(np.array(measured["lengths"]), lengths, own)
        found[name] = {
            "source": measured["source"],
            "windows": measured["windows"],
            "loss": expansion.loss,
            "first_order": measured["first_order"],
            "second_order": expansion.second_order.tolist(),
            "gamma": None if gamma is None else gamma.tolist(),
            "gap": None if gap is None else _gap(gap, expansion, points, matrix, mixtures),
            "expansion_error": expansion_error(expansion, alpha, seen),
            "steps": measured["steps"],
            "disagreements": measured["disagreements"],
        }
    return found


def _expansion(measured: Mapping[str, Any]) -> Expansion:
    """Return the expansion of a loss, its Hessian made symmetric."""
    bent = np.array(measured["second_order"])
    return Expansion(measured["loss"], np.array(measured["first_order"]), (bent + bent.T) / 2)


def _gap(
    gap: Gap,
    expansion: Expansion,
    points: Array,
    matrix: Array,
    mixtures: Mapping[str, Array | None],
) -> dict[str, Any]:
    """Return the gap at the named mixtures, and what it does to the ranks of all of them."""
    compared: Comparison = compare(expansion.at(points), gap.at(points))
    at: dict[str, float | None] = {
        name: None if m is None else float(gap.at(merge_weights(m, matrix)))
        for name, m in mixtures.items()
    }
    return {**at, **asdict(compared)}


def merges_to_check(matrix: Array, experts: Sequence[str]) -> list[dict[str, float]]:
    """Return merge weights at which an expansion is compared with the loss itself.

    Every expert alone, and the merge that stands for equal shares.
    """
    equal = merge_weights(simplex.uniform(matrix.shape[1]), matrix)
    return [dict(zip(experts, alpha, strict=True)) for alpha in [*np.eye(len(experts)), equal]]
