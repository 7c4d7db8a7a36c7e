"""Options of a launch that a stage cannot work with, refused before anything is built."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from megatron_mergemix.errors import ConfigError


def check_launch(args: argparse.Namespace, stage: str) -> None:
    """Refuse what cannot work in a stage.

    Raises:
        ConfigError: lists the options, each with the reason and what to do.
    """
    problems = list(_problems(args, stage))
    if problems:
        raise ConfigError(f"the stage {stage} cannot run with this launch: " + " ".join(problems))


def _problems(args: argparse.Namespace, stage: str) -> Iterator[str]:
    def is_set(name: str) -> bool:
        return bool(getattr(args, name, None))

    for flag in ("use_megatron_fsdp", "use_torch_fsdp2"):
        if is_set(flag):
            yield (
                f"--{flag.replace('_', '-')}: its checkpoints and parameters are laid out in a way "
                "that cannot be merged. Leave it away."
            )
    if args.ckpt_format != "torch_dist":
        yield f"--ckpt-format {args.ckpt_format}: experts are read as torch_dist. Use that."
    if is_set("non_persistent_ckpt_type"):
        yield "--non-persistent-ckpt-type: a resumed run could not tell which save is its last."
    if stage in ("expert", "reference"):
        if is_set("step_batch_size_schedule") and not is_set("global_batch_size"):
            yield (
                f"--step-batch-size-schedule {args.step_batch_size_schedule}: the tokens of "
                "experts are counted in batches of one size. Use --global-batch-size in its place "
                "in this stage."
            )
        return
    if args.context_parallel_size > 1:
        yield (
            f"--context-parallel-size {args.context_parallel_size}: scoring cuts no sequences. Use "
            "1; checkpoints do not depend on it."
        )
    for flag in ("fp8_param_gather", "fp8_param", "fp4_param"):
        if is_set(flag):
            yield (
                f"--{flag.replace('_', '-')}: parameters kept in fp8 cannot be merged in place. "
                "Leave it away in this stage."
            )
    for flag in ("moe_single_grouped_weight", "moe_single_grouped_bias"):
        if is_set(flag):
            yield (
                f"--{flag.replace('_', '-')}: a tensor that holds those of all MoE experts cannot "
                "be merged in place. Leave it away in this stage."
            )
    for flag, cut_by in (
        ("tensor_parallel_num_weight_shards", "tensor_model_parallel_size"),
        ("expert_tensor_parallel_num_weight_shards", "expert_tensor_parallel_size"),
    ):
        pieces = getattr(args, flag, None) or 1
        if pieces > (getattr(args, cut_by, None) or args.tensor_model_parallel_size):
            yield (
                f"--{flag.replace('_', '-')} {pieces}: weights that data-parallel ranks gather in "
                "a forward pass cannot be those of different candidates. Leave it away in this "
                "stage."
            )
    if is_set("perform_rl_step"):
        yield "--perform-rl-step: nothing is trained here. Leave it away in this stage."
