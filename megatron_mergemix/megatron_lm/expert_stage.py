"""The stages expert and reference: one run of Megatron-LM with the experts' budget."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

from megatron_mergemix.checkpoint.saves import complete_saves
from megatron_mergemix.config import Config
from megatron_mergemix.data.blend import blend_arguments
from megatron_mergemix.data.index_cache import remove_torn
from megatron_mergemix.data.indexed import share_of_split
from megatron_mergemix.errors import ConfigError
from megatron_mergemix.experiment.search_record import finished_search
from megatron_mergemix.megatron_lm.averaging import average_saves
from megatron_mergemix.megatron_lm.last_save import check_same_start, has_save
from megatron_mergemix.megatron_lm.launched_model import check_same_model, with_launched_model
from megatron_mergemix.megatron_lm.model_setup import check_vocabulary, wrapped_setup
from megatron_mergemix.megatron_lm.refusals import check_launch
from megatron_mergemix.megatron_lm.rewriting import NO_OTHER_DATA
from megatron_mergemix.megatron_lm.stage import NothingToDo, Pretrain, Stage, is_rank_0
from megatron_mergemix.megatron_lm.start_root import start_root
from megatron_mergemix.model_facts import model_facts, record_launch
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.training_runs.experiment_runs import base_checkpoint, requested_run
from megatron_mergemix.training_runs.mixtures import is_learned
from megatron_mergemix.training_runs.run import TrainingRun


class ExpertStage(Stage):
    """Trains ``experts/NAME`` or ``references/NAME``, from its last save if there is one."""

    def __init__(self, config: Config, name: str, stage: str) -> None:
        """Prepare the run called ``name``."""
        super().__init__(config)
        self.name = stage
        self.lock_name = name
        self._run_name = name
        self._directory = RunDir(config.run_dir).root / name
        self._run: TrainingRun | None = None
        self._resumes = False

    def after_parsing(self, args: argparse.Namespace) -> None:
        """Say where weights come from and go to."""
        check_launch(args, self.name)
        saves = self._directory / "checkpoints"
        resumes = self._resumes = has_save(saves)
        base = base_checkpoint(self.config)
        load = saves if resumes else start_root(self._directory / "start", base)
        self.rewriting.apply(
            args,
            load=str(load),
            save=str(saves),
            ckpt_step=None,
            pretrained_checkpoint=None,
            finetune=not resumes,
            no_load_optim=None if resumes else True,
            no_load_rng=None if resumes else True,
            no_save_optim=None,
            no_save_rng=None,
            exit_on_missing_checkpoint=True,
            skip_train=False,
        )

    def before_validation(self, args: argparse.Namespace) -> None:
        """Set data, budget and learning rate."""
        now = with_launched_model(self.config, args)
        check_same_model(self.config, now)
        if is_learned(now, self._run_name) and is_rank_0():
            finished_search(self.config)  # a result of other settings would be trained for nothing
        run = requested_run(now, self._run_name)
        if run.is_finished():
            raise NothingToDo(f"{run.name} is trained already: {run.final_checkpoint()}")
        self._run = run
        self.config = now
        self._set_saves(args, run)
        if (run.directory / "run.json").exists() and _last_step(run) >= run.steps:
            # Killed after its last save, before that was written down. Megatron-LM may not be asked
            # for no step at all: it ends where a blend has not one sample more than it took.
            if is_rank_0():
                run.mark_started()
            self._finish()
            self._run = None
            raise NothingToDo(f"{run.name} had made all of its {run.steps} steps before.")
        self._set_data(args, run)
        self._set_schedule(args, run)

    def around(self, pretrain: Pretrain) -> Pretrain:
        """Return ``pretrain`` followed by the record that the run is done."""

        @functools.wraps(pretrain)
        def then_finish(*args: Any, **kwargs: Any) -> Any:
            try:
                with wrapped_setup(self._record_before):
                    result = pretrain(*args, **kwargs)
            except SystemExit as leaving:  # by --exit-interval, --exit-duration-in-mins, a signal
                if not leaving.code:
                    self._finish()
                raise
            self._finish()
            return result

        return then_finish

    def _record_before(self, setup: Callable[..., Any]) -> Callable[..., Any]:
        def record_and_set_up(*args: Any, **kwargs: Any) -> Any:
            check_same_start(self._resumes)
            check_vocabulary(base_checkpoint(self.config))
            if is_rank_0():
                assert self._run is not None
                record_launch(self.config)
                self._run.mark_started()
            return setup(*args, **kwargs)

        return record_and_set_up

    def _set_data(self, args: argparse.Namespace, run: TrainingRun) -> None:
        split = self.config.blend.split
        run_dir = RunDir(self.config.run_dir)
        cache = run_dir.cache / run.name
        if is_rank_0():  # the others look there when they have met it
            remove_torn(cache)
        self.rewriting.apply(
            args,
            data_path=blend_arguments(list(run.blend)),
            **NO_OTHER_DATA,
            split=split,
            data_cache_path=str(cache),
            # They rely on an index that an earlier run has built.
            dataloader_fast_cache_load=False,
            dataloader_defer_npy_index_mmap=False,
            per_dataset_sequences_path=None,
            tensorboard_dir=str(run_dir.tensorboard(run.name)),
            seed=run.seed,
        )
        if args.wandb_exp_name:
            name = run.name.replace("/", "-")
            self.rewriting.apply(args, wandb_exp_name=f"{args.wandb_exp_name}-{name}")
        if share_of_split(split, "valid") == 0 and share_of_split(split, "test") == 0:
            self.rewriting.apply(args, eval_iters=0)

    def _set_schedule(self, args: argparse.Namespace, run: TrainingRun) -> None:
        if run.warmup_steps >= run.steps:
            raise ConfigError(
                f"experts.warmup_steps is {run.warmup_steps}, expected less than the {run.steps} "
                "steps that experts.tokens make with this launch's batches."
            )
        self.rewriting.apply(
            args,
            train_iters=run.steps,
            train_samples=None,
            phase_transition_iterations=None,
            rampup_batch_size=None,
            step_batch_size_schedule=None,
            iterations_to_skip=[],
            lr=run.lr,
            min_lr=run.lr,
            lr_decay_style="constant",
            lr_decay_iters=None,
            lr_decay_samples=None,
            lr_wsd_decay_iters=None,
            lr_wsd_decay_samples=None,
            lr_warmup_fraction=None,
            lr_warmup_iters=run.warmup_steps,
            lr_warmup_samples=0,
            lr_warmup_init=0.0,
        )

    def _set_saves(self, args: argparse.Namespace, run: TrainingRun) -> None:
        if args.save_interval is None:
            self.rewriting.apply(args, save_interval=self.config.training.save_interval)
        if len(run.averaged_steps) > 1:
            self.rewriting.apply(args, save_retain_interval=None)

    def _finish(self) -> None:
        """Say on rank 0 whether the run is done, and write it down."""
        run = self._run
        if run is None or not is_rank_0():  # None: there was nothing to do
            return
        step = _last_step(run)
        if step < run.steps:
            print(
                f"mergemix: {run.name} stopped after step {step} of {run.steps}. The same launch "
                "continues it.",
                flush=True,
            )
            return
        folder = run.checkpoints / f"iter_{run.steps:07d}"
        if len(run.averaged_steps) > 1:
            folder = average_saves(run)
        facts = model_facts(self.config)
        run.mark_finished(
            {
                "checkpoint": str(folder.relative_to(run.directory)),
                "steps": run.steps,
                "tokens": run.steps * facts.global_batch_size * facts.seq_length,
                "loss": None,
            }
        )
        print(f"mergemix: {run.name} is trained: {folder}", flush=True)


def _last_step(run: TrainingRun) -> int:
    """Return the step of the last complete save; 0 where there is none."""
    saves = complete_saves(run.checkpoints) if run.checkpoints.is_dir() else []
    return saves[-1][0] if saves else 0
