"""What a search or a diagnosis of this experiment left on record about its task vectors. No torch.

Nothing is measured for a plan: reading base and experts takes as long as merging them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_mergemix.config import Config
from megatron_mergemix.diagnosis import on_record
from megatron_mergemix.errors import MergeMixError
from megatron_mergemix.experiment import search_result
from megatron_mergemix.model_facts import is_known
from megatron_mergemix.task_vectors import cosines, norms


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
    try:
        record = (on_record(config) or _searched(config)) if is_known(config) else None
    except MergeMixError:  # base or experts are others by now, or not there yet
        return None
    if record is None:
        return None
    products = np.array(record["products"])
    lengths, alike = norms(products).tolist(), cosines(products).tolist()
    return TaskVectors(list(config.expert_names), lengths, alike, record.get("delta"))


def _searched(config: Config) -> dict[str, Any] | None:
    result = search_result(config)
    return None if result is None else {"products": result["task_vector_products"]}
