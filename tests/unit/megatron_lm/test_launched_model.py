from __future__ import annotations

import argparse
from typing import Any

import pytest

from megatron_mergemix.config import Config
from megatron_mergemix.errors import ConfigError
from megatron_mergemix.megatron_lm.launched_model import (
    check_same_model,
    global_batch_size,
    with_launched_model,
)
from megatron_mergemix.model_facts import model_facts
from tests.unit.megatron_lm.test_mixture_flag import config


def launch(**changes: Any) -> argparse.Namespace:
    args: dict[str, Any] = {
        "num_layers": 24,
        "hidden_size": 1024,
        "swiglu": True,
        "num_experts": None,
        "seq_length": 4096,
        "global_batch_size": 256,
        "micro_batch_size": 2,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "context_parallel_size": 1,
        "world_size": 16,
        "log_interval": 100,
        "adam_beta2": 0.95,
    }
    return argparse.Namespace(**{**args, **changes})


def launched(**changes: Any) -> Config:
    return with_launched_model(config(), launch(**changes))


def test_steps_are_counted_in_the_launch_s_batches() -> None:
    facts = model_facts(launched())
    assert facts.steps(5e9) == 4769  # 5e9 / (256 * 4096), rounded up


def test_without_the_flag_a_step_is_one_micro_batch_per_data_parallel_rank() -> None:
    assert global_batch_size(launch(global_batch_size=None)) == 2 * 16 // 4


def test_only_what_decides_results_is_put_on_record() -> None:
    before, after = model_facts(launched()), model_facts(launched(log_interval=1, world_size=64))
    assert before == after
    assert model_facts(launched(adam_beta2=0.99)) != before
    assert model_facts(launched(hidden_size=2048)) != before
    # A dense model does not care how a batch is cut; MoE balances its load within a micro-batch.
    assert model_facts(launched(micro_batch_size=1)) == before
    cut = model_facts(launched(num_experts=8, micro_batch_size=1))
    assert cut != model_facts(launched(num_experts=8))


def test_another_model_is_refused_by_argument() -> None:
    check_same_model(config(), launched())
    check_same_model(launched(), launched(adam_beta2=0.99))
    with pytest.raises(ConfigError, match=r"--num-layers: 24 -> 32, --seq-length: 4096 -> 8192"):
        check_same_model(launched(), launched(num_layers=32, seq_length=8192))


def test_a_capacity_of_experts_is_of_training_alone() -> None:
    """Stages that score leave it away, and describe the same model."""
    trained = launched(num_experts=4, moe_expert_capacity_factor=1.25)
    check_same_model(trained, launched(num_experts=4))
    assert trained.launched is not None
    assert trained.launched.training["training"]["moe_expert_capacity_factor"] == 1.25


def test_a_launch_that_was_not_made_yet_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="Run the expert stage first"):
        model_facts(config())


def test_a_missing_length_is_named() -> None:
    with pytest.raises(ConfigError, match="--seq-length is missing"):
        launched(seq_length=None)
