"""What a hierarchical search hands over beside the mixture: what each of its stages found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_mergemix.mixtures.levels import Inside
from megatron_mergemix.search.stage import Stage
from megatron_mergemix.search.strategy import Recommendation


@dataclass(frozen=True)
class StagedRecommendation(Recommendation):
    """The advice of a hierarchical search.

    Attributes:
        stages: in their order, see :func:`evidence_of`; of one that was skipped
            {"stage", "variables", "skipped" (why)}.
    """

    stages: Sequence[dict[str, Any]] = field(default=())


def evidence_of(stage: Stage) -> dict[str, Any]:
    """Return what a measured stage found, as plain data.

    {"stage", "variables", "share" (of the group while it was searched; 1 for all groups), "trials"
    (measured for this stage, the base among them), "reused" (measured by an earlier one)}, and of
    the advice of its own strategy "mixture" (over the variables), "source", "utility", "stderr",
    "alternatives", "surrogates" and "notes". The first stage bottom up, every domain alone, has no
    advice.
    """
    evidence: dict[str, Any] = {
        "stage": stage.name,
        "variables": list(stage.frame.variables),
        "share": stage.frame.total if isinstance(stage.frame, Inside) else 1.0,
        "trials": len(stage.trials),
        "reused": len(stage.reused),
    }
    if stage.name == "leaves":
        return evidence
    advice = stage.recommend()
    return {
        **evidence,
        "mixture": dict(advice.mixture),
        "source": advice.source,
        "utility": advice.utility,
        "stderr": advice.utility_stderr,
        "alternatives": advice.alternatives,
        "surrogates": advice.surrogates,
        "notes": list(advice.notes),
    }
