"""The search job: load base and experts once, run the loop, write down the result."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from megatron_mergemix import __version__
from megatron_mergemix.config import Config
from megatron_mergemix.evaluate.composite import CompositeEvaluator
from megatron_mergemix.evaluate.digests import objective
from megatron_mergemix.evaluate.make import make_evaluator
from megatron_mergemix.evaluate.utility import Utility
from megatron_mergemix.experiment.checks import check_checkpoints
from megatron_mergemix.experiment.digests import search_digests, trial_digests
from megatron_mergemix.experiment.strategy import make_strategy, merge_weights_of
from megatron_mergemix.files.publishing import publish_json
from megatron_mergemix.jobs.ensemble import measure_ensemble
from megatron_mergemix.jobs.experts_alone import score_experts
from megatron_mergemix.jobs.held_out import measure_held_out
from megatron_mergemix.megatron.gradient import check_differentiable
from megatron_mergemix.megatron.model import build_model
from megatron_mergemix.megatron.pass_memory import scoring_bytes
from megatron_mergemix.megatron.replicas import Replicas
from megatron_mergemix.megatron.resident import ResidentProxy
from megatron_mergemix.mixtures.components import noise_notes, norm, weights_text
from megatron_mergemix.model_facts import model_facts, vocab_size
from megatron_mergemix.processes.distributed import held_by_rank_0, rank, together
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.search import held_out
from megatron_mergemix.search.calibration import utility_scale
from megatron_mergemix.search.journal import Journal
from megatron_mergemix.search.loop import run_search
from megatron_mergemix.search.strategy import Recommendation, Strategy
from megatron_mergemix.search.waves import Divided
from megatron_mergemix.training_runs.experiment_runs import base_checkpoint, expert_checkpoints
from megatron_mergemix.trials import Scores, Trial


def search(config: Config) -> None:
    """Collective: search the mixture with the built-in model and write ``search/result.json``."""
    with held_by_rank_0(RunDir(config.run_dir).lock("search")):
        with together():
            if rank() == 0:  # a job of a cluster has no verb around it that does
                check_checkpoints(config)
                RunDir(config.run_dir).put_on_record(config.model_dump(mode="json"))
        assert config.model is not None, "checked when the YAML was loaded"
        chunks = build_model(config, vocab_size(config), seed=0)
        search_on(config, chunks, config.model.padded_vocab(vocab_size(config)))


def search_on(config: Config, chunks: Sequence[torch.nn.Module], vocab_rows: int) -> None:
    """Collective: search the mixture with a given model and write ``search/result.json``.

    Args:
        config: the experiment.
        chunks: this rank's model chunks; their weights are replaced.
        vocab_rows: of the model's embedding, padding included.
    """
    evaluator = make_evaluator(config, vocab_rows)
    differentiates = config.search.strategy == "gradient"
    if differentiates:
        with together():
            check_differentiable(chunks)
    proxy = ResidentProxy(
        chunks,
        base_checkpoint(config),
        expert_checkpoints(config),
        config.search.resident,
        Replicas(config.search.replicas),
        scoring_bytes(
            chunks,
            config.evaluate.micro_batch_size,
            model_facts(config).seq_length,
            differentiates=differentiates,
            kept_tokens=evaluator.kept_tokens,
        ),
    )
    _search_in_place(config, proxy, evaluator)


def _search_in_place(config: Config, proxy: ResidentProxy, evaluator: CompositeEvaluator) -> None:
    if config.search.ensemble:
        measure_ensemble(config, proxy, evaluator)
    merge_weights = merge_weights_of(config)
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
    run_search(
        strategy,
        journal,
        proxy,
        evaluator,
        merge_weights,
        report or (lambda trial: None),
        proxy.replicas,
        _divided(config, proxy.replicas),
        config.search.failures,
    )
    advice: Recommendation | None = None
    trials: Sequence[Trial] = ()
    with together():
        if strategy is not None and journal is not None and report is not None:
            report.close()
            advice, trials = strategy.recommend(), journal.trials()
    on_held_out, notes = _on_held_out_items(config, proxy, evaluator, advice, trials)
    with together():
        if advice is not None:
            alpha = merge_weights(advice.mixture)
            size = norm(alpha.values())
            more = [*noise_notes("The recommended mixture", size), *notes]
            result = {
                **vars(advice),
                "notes": [*advice.notes, *more],
                "merge_weights": alpha,
                "merge_weights_norm": size,
                "trials": len(trials),
                "held_out": on_held_out,
                "task_vector_products": proxy.task_vector_products.tolist(),
                "digests": digests,
                "version": __version__,
                "seconds": time.monotonic() - started,
            }
            publish_json(run_dir.result, result)
    score_experts(config, proxy, evaluator, trials)


def _divided(config: Config, replicas: Replicas | None) -> Divided:
    """Return what replicas divide: a command takes all ranks to wait for one candidate."""
    if not config.evaluate.commands:
        return config.search.replicas
    if rank() == 0 and replicas is not None and replicas.count > 1:
        names = ", ".join(config.evaluate.commands)
        print(f"search: commands score one candidate at a time ({names})", flush=True)
    return "requests"


def _on_held_out_items(
    config: Config,
    proxy: ResidentProxy,
    evaluator: CompositeEvaluator,
    advice: Recommendation | None,
    trials: Sequence[Trial],
) -> tuple[dict[str, Any] | None, list[str]]:
    """Collective: return how the advice does on items that the search never saw, and notes.

    Args:
        config: the experiment.
        proxy: base and experts, resident.
        evaluator: scores the proxy.
        advice: of the search; rank 0 only, None elsewhere.
        trials: of the search; rank 0 only.
    """
    if config.evaluate.held_out == 0:
        return None, []
    models = {} if advice is None else held_out.compared(advice, trials)
    wanted = {trial.index: trial.merge_weights for trial in models.values()}
    scores = measure_held_out(config, proxy, evaluator, wanted)
    found: dict[str, Any] | None = None
    notes: list[str] = []
    with together():
        if advice is not None:
            utility = Utility(config.evaluate.utility, objective(config))
            scale = utility_scale(utility, trials)
            found = held_out.comparison(config.evaluate, utility, scale, models, scores)
            notes = held_out.notes(config.evaluate, found)
    return found, notes


def _shown(trial: Trial) -> Scores:
    """Return the scores of a trial, or those of the minibatch that it differentiated."""
    return trial.scores if trial.gradient is None else trial.gradient.scores


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
                for capability, metrics in _shown(trial).items()
                for score in list(metrics.values())[:1]
            )
        if alpha := weights_text(trial.mixture, trial.merge_weights):
            shares += f"  |  {alpha}"
        part = "" if trial.first is None else f" ({100 * trial.first:g} %)"
        seconds = sum(trial.seconds.values())
        print(
            f"trial {trial.index:3d}  {trial.purpose + part:20s} {shares or 'base'}  |  {outcome}  "
            f"|  {seconds:.2f} s",
            flush=True,
        )
        for capability, metrics in trial.scores.items():
            for metric, score in metrics.items():
                name = f"{capability}/{metric}{'/first_share' if part else ''}"
                self._writer.add_scalar(name, score.value, trial.index)
        for name, share in trial.mixture.items():
            self._writer.add_scalar(f"mixture/{name}", share, trial.index)
        for name, weight in trial.merge_weights.items():
            self._writer.add_scalar(f"merge_weights/{name}", weight, trial.index)
        size = norm(trial.merge_weights.values())
        self._writer.add_scalar("merge_weights_norm", size, trial.index)
        if trial.task_vector_norm is not None:
            self._writer.add_scalar("task_vector_norm", trial.task_vector_norm, trial.index)
        self._writer.flush()

    def close(self) -> None:
        """Close the TensorBoard folder."""
        self._writer.close()
