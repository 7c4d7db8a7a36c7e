"""The stages search and evaluate: Megatron-LM builds the model, nothing is trained."""

from __future__ import annotations

import argparse
import functools
import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_mergemix.checkpoint.saves import resolve
from megatron_mergemix.config import Config
from megatron_mergemix.distributed import leave_process_groups, rank, together
from megatron_mergemix.errors import ConfigError
from megatron_mergemix.evaluate.make import make_evaluator
from megatron_mergemix.evaluation import (
    NamedModel,
    asked_of,
    evaluation_digests,
    publish_evaluation,
    record_path,
)
from megatron_mergemix.experiment import (
    check_checkpoints,
    search_result,
    write_learned_blend,
)
from megatron_mergemix.jobs.evaluate import resident_for, scores_of_model
from megatron_mergemix.jobs.search import search_in_place
from megatron_mergemix.jobs.validate import publish_scores
from megatron_mergemix.journal import Scores
from megatron_mergemix.megatron import generation
from megatron_mergemix.megatron.replicas import Replicas
from megatron_mergemix.megatron.resident import ResidentProxy
from megatron_mergemix.megatron_lm.launched_model import check_same_model, with_launched_model
from megatron_mergemix.megatron_lm.model_setup import padded_vocab_size, wrapped_setup
from megatron_mergemix.megatron_lm.refusals import check_launch
from megatron_mergemix.megatron_lm.stage import NothingToDo, Pretrain, Stage, is_rank_0
from megatron_mergemix.megatron_lm.start_root import start_root
from megatron_mergemix.model_facts import record_launch
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.training_runs import (
    base_checkpoint,
    expert_checkpoints,
    requested_run,
)
from megatron_mergemix.validation import reference_digests, scored_reference


class _Done(BaseException):
    """Leaves Megatron-LM's ``pretrain``; no handler of ordinary errors may stop it."""


class ScoringStage(Stage, ABC):
    """Has Megatron-LM build and load the model, then does its own work and leaves."""

    def after_parsing(self, args: argparse.Namespace) -> None:
        """Load weights only, save nothing, train nothing."""
        check_launch(args, self.name)
        folder = RunDir(self.config.run_dir).root / self.lock_name / "start"
        self.rewriting.apply(
            args,
            load=str(start_root(folder, self.checkpoint(args))),
            save=None,
            ckpt_step=None,
            pretrained_checkpoint=None,
            finetune=True,
            no_load_optim=True,
            no_load_rng=True,
            exit_on_missing_checkpoint=True,
            skip_train=True,
            # Data-parallel ranks may hold different candidates, and no optimizer makes them equal.
            overlap_param_gather=False,
            overlap_param_gather_with_optimizer_step=False,
            # Scoring runs other micro-batches than the launch, and other numbers of them.
            tp_comm_overlap=False,
            microbatch_group_size_per_vp_stage=None,
            # Both want a place for saves; and a run of its own per evaluation would be of no use.
            wandb_project=None,
            enable_ft_package=False,
        )

    def before_validation(self, args: argparse.Namespace) -> None:
        """Take the model from the arguments; it must be that of the experts."""
        now = with_launched_model(self.config, args)
        check_same_model(self.config, now)
        # The earlier record also says how experts were trained, which this launch need not repeat.
        self.config = now if self.config.launched is None else self.config
        self.begin()

    def around(self, pretrain: Pretrain) -> Pretrain:
        """Return ``pretrain`` cut short where the model is built and loaded."""

        @functools.wraps(pretrain)
        def score(*args: Any, **kwargs: Any) -> None:
            with wrapped_setup(self._work_after):
                try:
                    pretrain(*args, **kwargs)
                except _Done:
                    leave_process_groups()

        return score

    def _work_after(self, setup: Callable[..., Any]) -> Callable[..., None]:
        def set_up_and_work(*args: Any, **kwargs: Any) -> None:
            chunks = list(setup(*args, **kwargs)[0])
            if is_rank_0():
                record_launch(self.config)
            self.work(chunks)
            raise _Done

        return set_up_and_work

    @abstractmethod
    def checkpoint(self, args: argparse.Namespace) -> Path:
        """Return the iteration folder that Megatron-LM loads."""

    @abstractmethod
    def begin(self) -> None:
        """Check that there is something to do, before any process group is there."""

    @abstractmethod
    def work(self, chunks: list[torch.nn.Module]) -> None:
        """Collective: do the stage's work on the model that Megatron-LM built."""


class SearchStage(ScoringStage):
    """Searches the mixture in place."""

    name = "search"
    lock_name = "search"

    def checkpoint(self, args: argparse.Namespace) -> Path:
        """Return the base."""
        return base_checkpoint(self.config)

    def begin(self) -> None:
        """Check that the experts are there and the search is not done."""
        expert_checkpoints(self.config)
        if search_result(self.config) is not None:
            raise NothingToDo(f"the search is done already: {RunDir(self.config.run_dir).result}")

    def work(self, chunks: list[torch.nn.Module]) -> None:
        """Collective: search, write the result and the blend files."""
        config = self.config
        with together():
            check_checkpoints(config)
        evaluator = make_evaluator(config, padded_vocab_size())
        proxy = ResidentProxy(
            chunks,
            base_checkpoint(config),
            expert_checkpoints(config),
            config.search.resident,
            Replicas(config.search.replicas),
            generation.bytes_wanted(config, chunks, evaluator),
        )
        search_in_place(config, proxy, evaluator)
        with together():
            if rank() == 0 and (result := search_result(config)) is not None:
                shares = [f"{name} {share:.4f}" for name, share in result["mixture"].items()]
                print(f"mergemix: learned mixture: {', '.join(shares)}")
                folder = write_learned_blend(config, result)
                print(f"mergemix: blend files in {folder}", flush=True)


class EvaluateStage(ScoringStage):
    """Scores one checkpoint, or a merge of the experts, with the search's evaluators."""

    name = "evaluate"

    def __init__(
        self, config: Config, reference: str | None, path: str | None, model: str | None = None
    ) -> None:
        """Prepare to score one model.

        Args:
            config: the experiment.
            reference: a reference model that was really trained.
            path: a checkpoint.
            model: a word as in :mod:`megatron_mergemix.evaluation`. Without any of the three it is
                the launch's ``--load``.
        """
        super().__init__(config)
        given = {"mixture": reference, "checkpoint": path, "model": model}
        if sum(value is not None for value in given.values()) > 1:
            flags = " and ".join(f"--mergemix-{n}" for n, v in given.items() if v is not None)
            raise ConfigError(f"{flags}: give one of them.")
        what = reference or hashlib.sha256((path or model or "").encode()).hexdigest()[:12]
        self.lock_name = f"evaluate/{what}"
        self._reference = reference
        self._path = path
        self._model = model
        self._asked: NamedModel | None = None

    def checkpoint(self, args: argparse.Namespace) -> Path:
        """Return the folder that is loaded: the base where a merge is scored."""
        if self._asked is None:
            self._asked = self._found(args)
        return self._asked.checkpoint or base_checkpoint(self.config)

    def begin(self) -> None:
        """Check that the model is not scored already."""
        if self._reference:
            if scored_reference(self.config, self._reference) is not None:
                raise NothingToDo(f"references/{self._reference} is scored already.")
        elif self._model and self._asked is not None:
            digests = evaluation_digests(self.config, self._asked)
            if (path := record_path(self.config, digests)).exists():
                raise NothingToDo(f"{self._asked.name} is scored already: {path}")

    def work(self, chunks: list[torch.nn.Module]) -> None:
        """Collective: score, print and write down."""
        config, asked = self.config, self._asked
        assert asked is not None
        with together():  # every rank, because that loads the tasks of lm-eval
            digests = self._digests(asked)
        logs = RunDir(config.run_dir).evaluate / "commands"
        evaluator = make_evaluator(config, padded_vocab_size(), logs)
        if asked.checkpoint is None:
            proxy = resident_for(config, chunks, [asked], evaluator)
        else:
            wanted = generation.bytes_wanted(config, chunks, evaluator)
            proxy = ResidentProxy(chunks, asked.checkpoint, experts={}, wanted=wanted)
        started = time.monotonic()
        scores = scores_of_model(proxy, evaluator, asked)
        with together():
            if rank() == 0:
                self._publish(asked, digests, scores, time.monotonic() - started)

    def _digests(self, asked: NamedModel) -> dict[str, str]:
        if self._reference:
            return reference_digests(self.config, self._reference)
        return evaluation_digests(self.config, asked)

    def _found(self, args: argparse.Namespace) -> NamedModel:
        if self._model:
            return asked_of(self.config, self._model)
        if self._reference:
            run = requested_run(self.config, f"references/{self._reference}")
            return NamedModel(str(run.final_checkpoint()), run.final_checkpoint())
        path = self._path or args.load
        if path is None:
            raise ConfigError(
                "the stage evaluate needs a checkpoint: --mergemix-checkpoint, --mergemix-mixture "
                "of a trained reference, --mergemix-model of a merge, or --load."
            )
        return NamedModel(str(resolve(Path(path))), resolve(Path(path)))

    def _publish(
        self, asked: NamedModel, digests: Mapping[str, str], scores: Scores, seconds: float
    ) -> None:
        print(f"mergemix: {asked.name}")
        for capability, metrics in scores.items():
            for metric, score in metrics.items():
                error = "" if score.stderr is None else f" +- {score.stderr:.4f}"
                print(f"  {capability:20s} {metric:6s} {score.value:.4f}{error} {score.unit}")
        if self._reference:
            publish_scores(self.config, self._reference, digests, scores, seconds)
            return
        path = publish_evaluation(self.config, asked, digests, scores, seconds)
        print(f"mergemix: written to {path}", flush=True)
