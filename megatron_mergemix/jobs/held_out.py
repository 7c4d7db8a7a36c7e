"""The last thing that a search measures: a few models on items that it never saw."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron_mergemix.config import Config
from megatron_mergemix.errors import EvaluationError
from megatron_mergemix.evaluate.evaluator import SplitEvaluator
from megatron_mergemix.evaluate.proxy import Proxy
from megatron_mergemix.experiment.digests import trial_digests
from megatron_mergemix.files.publishing import publish_json
from megatron_mergemix.processes.distributed import broadcast_object, from_rank_0, rank, together
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.trials import Scores, record_of, scores_of


def measure_held_out(
    config: Config,
    proxy: Proxy,
    evaluator: SplitEvaluator,
    wanted: Mapping[int, Mapping[str, float]],
) -> dict[int, Scores]:
    """Collective: score merges on held-out items; the proxy ends at the base.

    What was scored by an earlier start is in ``search/held_out.json`` and not scored again.

    Args:
        config: the experiment.
        proxy: base and experts, resident.
        evaluator: scores the proxy.
        wanted: index of a trial -> its merge weights; of rank 0.

    Returns:
        Index of the trial -> scores; one that cannot be scored is left out, and said.
    """
    path = RunDir(config.run_dir).held_out
    digests: dict[str, str] = {}
    scored: dict[str, Any] = {}

    def look() -> dict[int, Mapping[str, float]]:
        digests.update(held_out_digests(config))
        if path.exists() and (known := json.loads(path.read_text()))["digests"] == digests:
            scored.update(known["scores"])
        for index, alpha in wanted.items():  # a search begun anew numbers other merges alike
            if scored.get(str(index), {}).get("merge_weights") != dict(alpha):
                scored.pop(str(index), None)
        return {index: alpha for index, alpha in wanted.items() if str(index) not in scored}

    missing = from_rank_0(look)
    for index, alpha in missing.items():
        proxy.apply(alpha)
        try:
            scores = evaluator.evaluate_held_out(proxy)
        except EvaluationError as error:  # raised on every rank alike
            if rank() == 0:
                print(f"held out: trial {index} cannot be scored: {error}", flush=True)
            continue
        with together():
            if rank() == 0:
                scored[str(index)] = {"merge_weights": dict(alpha), "scores": record_of(scores)}
                publish_json(path, {"digests": digests, "scores": scored})
    if missing:
        proxy.apply({})
    mine = {i: scores_of(scored[str(i)]["scores"]) for i in wanted if str(i) in scored}
    return broadcast_object(mine)


def held_out_digests(config: Config) -> dict[str, str]:
    """Return what scores on held-out items depend on besides the merge."""
    return {**trial_digests(config), "evaluate.held_out": str(config.evaluate.held_out)}
