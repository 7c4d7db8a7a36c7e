"""The experts' own say: every expert scores every held-out token, once, before the search."""

from __future__ import annotations

from megatron_mergemix.config import Config
from megatron_mergemix.errors import EvaluationError
from megatron_mergemix.evaluate.composite import CompositeEvaluator
from megatron_mergemix.evaluate.proxy import Proxy
from megatron_mergemix.experiment.digests import ensemble_digests
from megatron_mergemix.experiment.strategy import ensemble_paths
from megatron_mergemix.processes.distributed import broadcast_object, rank, together
from megatron_mergemix.search.ensemble_files import has_tokens, write_tokens


def measure_ensemble(config: Config, proxy: Proxy, evaluator: CompositeEvaluator) -> None:
    """Collective: measure the experts that are not measured yet; the proxy ends at the base.

    Raises:
        SearchError: a file of an earlier start is damaged or was measured on something else.
        EvaluationError: an expert's loss is not finite.
    """
    missing: list[str] = []
    with together():
        if rank() == 0:
            paths, digests = ensemble_paths(config), ensemble_digests(config)
            missing = [name for name in paths if not has_tokens(paths[name], digests[name])]
    missing = broadcast_object(missing)
    for name in missing:
        proxy.apply({name: 1.0})
        try:
            values = evaluator.token_log_likelihoods(proxy)
        except EvaluationError as error:
            raise EvaluationError(
                f"expert {name}: {error} Its training went wrong: take an earlier save of it, or "
                "train it again."
            ) from error
        with together():
            if rank() == 0:
                write_tokens(paths[name], digests[name], values)
                print(f"ensemble: expert {name} scored the held-out tokens", flush=True)
    if missing:
        proxy.apply({})
