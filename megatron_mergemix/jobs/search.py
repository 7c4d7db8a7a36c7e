"""The search job: load base and experts once, run the loop, write down the result."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_mergemix import __version__, simplex
from megatron_mergemix.config import Config
from megatron_mergemix.distributed import held_by_rank_0, rank, together
from megatron_mergemix.evaluate.evaluator import Evaluator
from megatron_mergemix.evaluate.loss import LossEvaluator
from megatron_mergemix.experiment import (
    check_checkpoints,
    make_strategy,
    search_digests,
    trial_digests,
)
from megatron_mergemix.journal import Journal, Trial
from megatron_mergemix.megatron.model import build_model
from megatron_mergemix.megatron.resident import ResidentProxy
from megatron_mergemix.model_facts import model_facts
from megatron_mergemix.run_dir import RunDir, publish_json
from megatron_mergemix.search.loop import run_search
from megatron_mergemix.search.strategy import Strategy
from megatron_mergemix.training_runs import (
    base_checkpoint,
    component_matrix,
    expert_checkpoints,
    vocab_size,
)


def search(config: Config) -> None:
    """Collective: search the mixture with the built-in model and write ``search/result.json``."""
    with held_by_rank_0(RunDir(config.run_dir).lock("search")):
        with together():
            check_checkpoints(config)
        assert config.model is not None, "checked when the YAML was loaded"
        chunks = build_model(config, vocab_size(config), seed=0)
        evaluator = loss_evaluator(config, config.model.padded_vocab(vocab_size(config)))
        proxy = ResidentProxy(chunks, base_checkpoint(config), expert_checkpoints(config))
        search_in_place(config, proxy, evaluator)


def search_in_place(config: Config, proxy: ResidentProxy, evaluator: Evaluator) -> None:
    """Collective: run the search on a proxy that is already resident."""
    matrix = component_matrix(config)
    domains, experts = list(config.domains), list(config.domains)

    def merge_weights(mixture: Mapping[str, float]) -> Mapping[str, float]:
        if not mixture:
            return dict.fromkeys(experts, 0.0)
        alpha = simplex.merge_weights(simplex.to_vector(mixture, domains), matrix)
        return simplex.to_mixture(alpha, experts)

    run_dir = RunDir(config.run_dir)
    strategy: Strategy | None = None
    journal: Journal | None = None
    report: SearchReport | None = None
    with together():
        if rank() == 0:
            digests = search_digests(config)  # of what is there now, not when the search ends
            strategy = make_strategy(config)
            journal = Journal(run_dir.trials, trial_digests(config))
            report = SearchReport(run_dir, journal.trials())
    started = time.monotonic()
    run_search(strategy, journal, proxy, evaluator, merge_weights, report or (lambda trial: None))
    with together():
        if strategy is not None and journal is not None and report is not None:
            report.close()
            advice = strategy.recommend()
            result = {
                **vars(advice),
                "merge_weights": merge_weights(advice.mixture),
                "trials": len(journal.trials()),
                "task_vector_products": proxy.task_vector_products.tolist(),
                "digests": digests,
                "version": __version__,
                "seconds": time.monotonic() - started,
            }
            publish_json(run_dir.result, result)


def loss_evaluator(config: Config, vocab_rows: int) -> LossEvaluator:
    """Collective: return the evaluator of all held-out losses; every rank reads its own copy.

    Args:
        config: the experiment.
        vocab_rows: of the model's embedding, padding included.
    """
    with together():
        return LossEvaluator(
            {name: c.loss for name, c in config.evaluate.capabilities.items()},
            seq_length=model_facts(config).seq_length,
            vocab_size=vocab_rows,
            micro_batch_size=config.evaluate.micro_batch_size,
        )


class SearchReport:
    """A line and TensorBoard scalars per trial, on rank 0."""

    def __init__(self, run_dir: RunDir, before: Sequence[Trial]):
        """Open the TensorBoard folder; ``before`` are the trials of an earlier start."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run_dir.tensorboard("search")))
        if before:
            print(f"search: continues after {len(before)} trials", flush=True)

    def __call__(self, trial: Trial) -> None:
        """Show one new trial."""
        shares = " ".join(f"{name} {share:.2f}" for name, share in trial.mixture.items())
        if trial.error:
            outcome = f"failed: {trial.error}"
        else:
            outcome = "  ".join(
                f"{capability} {score.value:.4f}"
                for capability, metrics in trial.scores.items()
                for score in list(metrics.values())[:1]
            )
        seconds = trial.seconds["merge"] + trial.seconds["evaluate"]
        print(
            f"trial {trial.index:3d}  {trial.purpose:20s} {shares or 'base'}  |  {outcome}  "
            f"|  {seconds:.2f} s",
            flush=True,
        )
        for capability, metrics in trial.scores.items():
            for metric, score in metrics.items():
                self._writer.add_scalar(f"{capability}/{metric}", score.value, trial.index)
        if trial.task_vector_norm is not None:
            self._writer.add_scalar("task_vector_norm", trial.task_vector_norm, trial.index)
        self._writer.flush()

    def close(self) -> None:
        """Close the TensorBoard folder."""
        self._writer.close()
