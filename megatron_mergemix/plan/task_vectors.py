"""What a search or a diagnosis of this experiment left on record about its task vectors. No torch.

Nothing is measured for a plan: reading base and experts takes as long as merging them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mergemix.config import Config
from megatron_mergemix.diagnosis.task_vectors import cosines, norms
from megatron_mergemix.errors import CheckpointError, TrainingError
from megatron_mergemix.experiment.digests import checkpoint_digests, of_checkpoints
from megatron_mergemix.model_facts import is_known
from megatron_mergemix.run_dir import RunDir


@dataclass(frozen=True)
class TaskVectors:
    """The task vectors of all experts.

    Attributes:
        experts: K names.
        norms: L2, ``[K]``.
        cosines: ``[K][K]``.
        delta: relative update sizes ``[K]``; None where no diagnosis was made.
    """

    experts: Sequence[str]
    norms: Sequence[float]
    cosines: Sequence[Sequence[float]]
    delta: Sequence[float] | None


def task_vectors_on_record(config: Config) -> TaskVectors | None:
    """Return the task vectors of these very experts, or None where nobody has measured them."""
    if not is_known(config):  # before the first launch of Megatron-LM
        return None
    try:
        now = checkpoint_digests(config)
    except (CheckpointError, TrainingError):  # base or experts are not there yet, or others by now
        return None
    run_dir, experts = RunDir(config.run_dir), list(config.expert_names)
    diagnosed = _of_these(run_dir.diagnosis_measured, now)
    if diagnosed is not None:
        return _task_vectors(experts, diagnosed["products"], diagnosed["delta"])
    result = _of_these(run_dir.result, now)
    products = None if result is None else result.get("task_vector_products")
    return None if products is None else _task_vectors(experts, products, None)


def _task_vectors(
    experts: Sequence[str], products: Sequence[Sequence[float]], delta: Sequence[float] | None
) -> TaskVectors:
    inner = np.array(products)
    return TaskVectors(experts, norms(inner).tolist(), cosines(inner).tolist(), delta)


def _of_these(path: Path, now: Mapping[str, str]) -> dict[str, Any] | None:
    """Return a record of this base and these experts, in this order; their settings may differ."""
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    return record if list(of_checkpoints(record["digests"]).items()) == list(now.items()) else None
