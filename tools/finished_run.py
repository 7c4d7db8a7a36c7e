"""Base and experts of a finished run, on one rank, for benchmarks that search them anew."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_mergemix.config import Config
from megatron_mergemix.evaluate.utility import Scale, Utility
from megatron_mergemix.experiment.strategy import merge_weights_of
from megatron_mergemix.mixtures.simplex import dense_points, to_mixture
from megatron_mergemix.search.landscape import Landscape
from megatron_mergemix.search.make import bounds_of
from megatron_mergemix.search.purposes import is_gradient
from megatron_mergemix.search.selection import refined_argmax
from megatron_mergemix.training_runs.mixtures import train_tokens
from megatron_mergemix.trials import Scores, Trial


class Remembering:
    """A proxy and its evaluator that score a mixture once, however many searches ask for it."""

    def __init__(self, proxy: Any, evaluator: Any) -> None:
        self._proxy, self._evaluator = proxy, evaluator
        self._at: tuple[float, ...] = ()
        self._known: dict[tuple[object, ...], Scores] = {}

    def apply(self, merge_weights: Mapping[str, float]) -> float:
        """Merge."""
        self._at = tuple(merge_weights.values())
        return float(self._proxy.apply(merge_weights))

    def evaluate(self, proxy: Any) -> Scores:
        """Score on all items, or remember."""
        return self._once("all", lambda: self._evaluator.evaluate(self._proxy))

    def evaluate_first(self, proxy: Any) -> Scores:
        """Score on the first share of the items, or remember."""
        return self._once("first", lambda: self._evaluator.evaluate_first(self._proxy))

    def evaluate_others(self, proxy: Any, first: Scores) -> Scores:
        """Score on the other items, or remember."""
        return self._once("all", lambda: self._evaluator.evaluate_others(self._proxy, first))

    def gradients(self, proxy: Any, minibatch: Any) -> Any:
        """Differentiate."""
        return self._evaluator.gradients(self._proxy, minibatch)

    def loss_gradient(self, *args: Any) -> Any:
        """Differentiate losses."""
        return self._proxy.loss_gradient(*args)

    def sequence_losses(self, *args: Any) -> Any:
        """Score sequences."""
        return self._proxy.sequence_losses(*args)

    def token_losses(self, *args: Any) -> Any:
        """Score tokens."""
        return self._proxy.token_losses(*args)

    def _once(self, items: str, score: Callable[[], Scores]) -> Scores:
        key = (items, *self._at)
        if key not in self._known:
            self._known[key] = score()
        return self._known[key]


def resident(config: Config) -> Any:
    """Return base and experts of a finished training, on one rank."""
    from megatron_mergemix.megatron import parallel
    from megatron_mergemix.megatron.model import build_model
    from megatron_mergemix.megatron.resident import ResidentProxy
    from megatron_mergemix.model_facts import vocab_size
    from megatron_mergemix.training_runs.experiment_runs import base_checkpoint, expert_checkpoints

    assert config.model is not None, "the built-in model is searched"
    alone = config.model_copy(update={"parallel": type(config.parallel)()})
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    parallel.start(alone.parallel)
    chunks = build_model(alone, vocab_size(config), seed=0)
    return ResidentProxy(chunks, base_checkpoint(config), expert_checkpoints(config))


def scored(config: Config, proxy: Any) -> Remembering:
    """Return it with the evaluator of a search."""
    from megatron_mergemix.evaluate.make import make_evaluator
    from megatron_mergemix.model_facts import vocab_size

    assert config.model is not None
    return Remembering(proxy, make_evaluator(config, config.model.padded_vocab(vocab_size(config))))


def optimum(
    config: Config, trials: Sequence[Trial], utility: Utility, scale: Scale
) -> Mapping[str, float]:
    """Return the mixture at the optimum of the surface fitted to every mixture of these trials."""
    domains = list(config.domains)
    known = {
        tuple(trial.mixture.values()): trial
        for trial in trials
        if trial.mixture and trial.first is None and trial.error is None and not is_gradient(trial)
    }
    surface = Landscape(list(known.values()), domains, utility, scale, "auto")
    fitted = ", ".join(f"{name} {e['surrogate']}" for name, e in surface.evidence.items())
    print(f"\nsurface fitted to {len(known)} mixtures ({fitted})")
    bounds = bounds_of(config, train_tokens(config))
    points = dense_points(bounds, np.random.default_rng(0))
    rng = np.random.default_rng(1)
    return to_mixture(refined_argmax(surface, points, surface(points), bounds, rng), domains)


def score(config: Config, remembering: Remembering, mixture: Mapping[str, float]) -> Scores:
    """Return the scores of a real merge on all items."""
    remembering.apply(merge_weights_of(config)(mixture))
    return remembering.evaluate(remembering)
