from __future__ import annotations

import argparse
from typing import Any

import pytest

from megatron_mergemix.errors import ConfigError
from megatron_mergemix.megatron_lm.refusals import check_launch


def launch(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(
        **{
            "ckpt_format": "torch_dist",
            "context_parallel_size": 1,
            "tensor_model_parallel_size": 2,
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("changes", "stages", "message"),
    [
        ({"use_megatron_fsdp": True}, ("expert", "search"), "--use-megatron-fsdp"),
        ({"use_torch_fsdp2": True}, ("reference", "evaluate"), "--use-torch-fsdp2"),
        ({"ckpt_format": "torch"}, ("expert", "search"), "--ckpt-format torch: experts are read"),
        ({"non_persistent_ckpt_type": "local"}, ("expert",), "--non-persistent-ckpt-type"),
        ({"context_parallel_size": 2}, ("search", "evaluate"), "--context-parallel-size 2"),
        ({"fp8_param_gather": True}, ("search",), "--fp8-param-gather"),
        (
            {"moe_single_grouped_weight": True},
            ("search", "diagnose"),
            "--moe-single-grouped-weight: a tensor that holds those of all MoE experts",
        ),
        (
            {"tensor_parallel_num_weight_shards": 4},
            ("search", "evaluate"),
            "--tensor-parallel-num-weight-shards 4: weights that data-parallel ranks gather",
        ),
        (
            {"expert_tensor_parallel_num_weight_shards": 2, "expert_tensor_parallel_size": 1},
            ("search",),
            "--expert-tensor-parallel-num-weight-shards 2",
        ),
        ({"perform_rl_step": True}, ("evaluate",), "--perform-rl-step"),
        (
            {"step_batch_size_schedule": "0:768 250B:1536"},
            ("expert", "reference"),
            "--step-batch-size-schedule 0:768 250B:1536: .* --global-batch-size",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(
    changes: dict[str, Any], stages: tuple[str, ...], message: str
) -> None:
    for stage in stages:
        with pytest.raises(ConfigError, match=f"the stage {stage} cannot run .*{message}"):
            check_launch(launch(**changes), stage)


def test_experts_may_be_trained_with_context_parallelism() -> None:
    check_launch(launch(context_parallel_size=4), "expert")


def test_weights_may_be_cut_by_tensor_ranks_alone() -> None:
    """Megatron-LM fills the number in by itself when it validates the arguments."""
    check_launch(
        launch(tensor_parallel_num_weight_shards=2, expert_tensor_parallel_num_weight_shards=2),
        "search",
    )


def test_a_schedule_of_batch_sizes_is_no_matter_beside_one_size_or_in_a_search() -> None:
    schedule = "0:768 250B:1536"
    check_launch(launch(step_batch_size_schedule=schedule, global_batch_size=768), "expert")
    check_launch(launch(step_batch_size_schedule=schedule), "search")


def test_all_problems_are_in_one_message() -> None:
    with pytest.raises(ConfigError, match="--use-megatron-fsdp.*--ckpt-format fsdp_dtensor"):
        check_launch(launch(use_megatron_fsdp=True, ckpt_format="fsdp_dtensor"), "expert")
