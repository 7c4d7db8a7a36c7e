"""The stage that scores one model on the model that Megatron-LM built."""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_mergemix.checkpoint.saves import resolve
from megatron_mergemix.config import Config
from megatron_mergemix.errors import ConfigError
from megatron_mergemix.evaluate.make import make_evaluator
from megatron_mergemix.experiment.named_models import (
    NamedModel,
    asked_of,
    evaluation_digests,
    publish_evaluation,
    record_path,
)
from megatron_mergemix.jobs.evaluate import resident_alone, resident_for, scores_of_model
from megatron_mergemix.megatron_lm.model_setup import padded_vocab_size
from megatron_mergemix.megatron_lm.scoring_stage import ScoringStage
from megatron_mergemix.megatron_lm.stage import NothingToDo
from megatron_mergemix.processes.distributed import rank, together
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.training_runs.experiment_runs import base_checkpoint, requested_run
from megatron_mergemix.trials import Scores
from megatron_mergemix.validation.references import (
    publish_scores,
    reference_digests,
    scored_reference,
)


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
            model: a word as in :mod:`megatron_mergemix.experiment.named_models`. Without
                any of the three it is the launch's ``--load``.
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
            proxy = resident_alone(config, chunks, asked.checkpoint, evaluator)
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
