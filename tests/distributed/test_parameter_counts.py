"""The counts of ``cost`` and ``memory`` against models that Megatron Core really builds."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_mergemix.config import Config
from megatron_mergemix.plan.cost import count_parameters
from megatron_mergemix.plan.memory import stage_parameters
from tests.support.run_distributed import run_distributed

VOCAB = 257
PLAIN: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 16,
    "make_vocab_size_divisible_by": 8,
}
GPT2: dict[str, Any] = {
    **PLAIN,
    "activation": "gelu",
    "normalization": "LayerNorm",
    "position_embedding": "learned_absolute",
    "tie_embeddings": False,
    "num_query_groups": 2,
    "ffn_hidden_size": 64,
}
MOE: dict[str, Any] = {**PLAIN, "num_moe_experts": 4, "moe_ffn_hidden_size": 48}


def config_of(model: dict[str, Any], **parallel: int) -> Config:
    return Config.model_validate(
        {
            "run_dir": "unused",
            "model": model,
            "parallel": parallel,
            "base": {"checkpoint": "unused"},
            "domains": {"a": {"prefixes": ["a"]}, "b": {"prefixes": ["b"]}},
            "evaluate": {"capabilities": {"a": {"loss": {"prefixes": ["h"]}}}},
        }
    )


def parameters_on_this_rank(config: Config) -> tuple[int, int, int]:
    """Return this rank's pipeline stage, its parameters without and of MoE experts."""
    from megatron.core import parallel_state

    from megatron_mergemix.megatron import parallel
    from megatron_mergemix.megatron.model import build_model

    parallel.start(config.parallel)
    (chunk,) = build_model(config, VOCAB, seed=1)
    dense = moe = 0
    for name, parameter in chunk.named_parameters():
        if ".experts." in name:
            moe += parameter.numel()
        else:
            dense += parameter.numel()
    return parallel_state.get_pipeline_model_parallel_rank(), dense, moe


@pytest.mark.parametrize("model", [PLAIN, GPT2, MOE], ids=["plain", "gpt2", "moe"])
def test_the_total_is_what_megatron_builds_on_one_rank(model: dict[str, Any]) -> None:
    config = config_of(model)
    ((stage, dense, moe),) = run_distributed(parameters_on_this_rank, 1, config)
    assert config.model is not None
    assert (stage, dense + moe) == (0, count_parameters(config.model, VOCAB).total)


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        (PLAIN, {"processes": 4, "tensor": 2, "pipeline": 2}),
        (GPT2, {"processes": 4, "tensor": 2, "pipeline": 2}),
        (MOE, {"processes": 2, "expert": 2}),
    ],
    ids=["plain", "gpt2", "moe"],
)
def test_every_rank_holds_what_its_stage_should(
    model: dict[str, Any], layout: dict[str, int]
) -> None:
    config = config_of(model, **layout)
    assert config.model is not None
    for stage, dense, moe in run_distributed(parameters_on_this_rank, layout["processes"], config):
        assert (dense, moe) == stage_parameters(config.model, config.parallel, VOCAB, stage)
