"""What stages share that only score: Megatron-LM builds the model, nothing is trained."""

from __future__ import annotations

import argparse
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_mergemix.megatron_lm.launched_model import check_same_model, with_launched_model
from megatron_mergemix.megatron_lm.model_setup import wrapped_setup
from megatron_mergemix.megatron_lm.refusals import check_launch
from megatron_mergemix.megatron_lm.stage import Pretrain, Stage, is_rank_0
from megatron_mergemix.megatron_lm.start_root import start_root
from megatron_mergemix.model_facts import record_launch
from megatron_mergemix.processes.distributed import leave_process_groups
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.training_runs.experiment_runs import base_checkpoint


class _Done(BaseException):
    """Leaves Megatron-LM's ``pretrain``; no handler of ordinary errors may stop it."""


class ScoringStage(Stage, ABC):
    """Has Megatron-LM build and load the model, then does its own work and leaves."""

    trains = False

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
            # Its worker would keep memory of the device, and outlive a rank that ends at once.
            async_save=False,
            use_persistent_ckpt_worker=False,
            logits_save_dir=None,  # wants that worker
            # Data-parallel ranks may hold different candidates, and no optimizer makes them equal.
            overlap_param_gather=False,
            overlap_param_gather_with_optimizer_step=False,
            # Weights are merged in 16 bits; scales of fp8 follow in training alone.
            fp8=None,
            fp4=None,
            fp8_output_proj=False,
            moe_router_padding_for_fp8=False,
            moe_router_padding_for_quantization=False,
            te_precision_config_file=None,  # may name layers that stay in fp8
            kitchen_config_file=None,
            kitchen_recipe_number=None,
            # Scoring runs other micro-batches than the launch, and other numbers of them.
            tp_comm_overlap=False,
            microbatch_group_size_per_vp_stage=None,
            # A text may not lose tokens to those that share its micro-batch, nor see noise.
            moe_expert_capacity_factor=None,
            moe_pad_expert_input_to_capacity=False,
            moe_paged_stash=False,
            moe_input_jitter_eps=None,
            # The training loop empties what these fill in every forward pass.
            defer_embedding_wgrad_compute=False,
            fine_grained_activation_offloading=False,
            qk_clip=False,
            # Both want a place for saves; and a run of its own per evaluation would be of no use.
            wandb_project=None,
            enable_ft_package=False,
        )
        if getattr(args, "moe_flex_dispatcher_backend", None) != "ncclep":
            # The others drop what is beyond it; this one needs it, and dies of it.
            self.rewriting.apply(args, moe_expert_rank_capacity_factor=None)
        if not getattr(args, "num_experts", None):  # layers of MoE experts want it under TP
            # Single tokens cannot be cut over ranks, and a few positions are asked for.
            self.rewriting.apply(args, sequence_parallel=False)

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

    def checkpoint(self, args: argparse.Namespace) -> Path:
        """Return the iteration folder that Megatron-LM loads: the base."""
        return base_checkpoint(self.config)

    @abstractmethod
    def begin(self) -> None:
        """Check that there is something to do, before any process group is there."""

    @abstractmethod
    def work(self, chunks: list[torch.nn.Module]) -> None:
        """Collective: do the stage's work on the model that Megatron-LM built."""
