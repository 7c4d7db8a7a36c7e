"""Sizes and costs, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from megatron_mergemix.config import Model
from megatron_mergemix.plan.cost import (
    PAPER_COSTS,
    Layer,
    Parameters,
    count_parameters,
    forward_flops,
    layer_parameters,
    training_flops,
)

SMALL = Model(
    num_layers=2,
    hidden_size=8,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=20,
    make_vocab_size_divisible_by=16,
)


def test_a_layer_with_grouped_queries_and_swiglu() -> None:
    # queries 8x8, keys and values 2 x 8x4, output 8x8; two norms of 8; gate, up and down 8x20.
    assert layer_parameters(SMALL) == Layer(64 + 64 + 64, 16, 3 * 160, 0, 0)


def test_a_dense_model_is_wholly_active() -> None:
    # 257 tokens pad to 272 rows of 8, used twice; 2 layers of 688; the last norm.
    assert count_parameters(SMALL, 257) == Parameters(2176 + 1376 + 8, 2176 + 1376 + 8)


def test_gpt2_small_has_its_known_size_without_biases() -> None:
    """124,439,808 with biases; 12 layers of 768*(3+1+4+1) biases are left out."""
    gpt2 = Model(
        num_layers=12,
        hidden_size=768,
        num_attention_heads=12,
        seq_length=1024,
        activation="gelu",
        normalization="LayerNorm",
        position_embedding="learned_absolute",
        make_vocab_size_divisible_by=1,
    )
    assert count_parameters(gpt2, 50257).total == 124_439_808 - 12 * 768 * 9


def test_a_moe_model_counts_only_the_chosen_experts_as_active() -> None:
    moe = SMALL.model_copy(update={"num_moe_experts": 4, "moe_top_k": 2, "moe_ffn_hidden_size": 10})
    # Each MoE expert 3 x 8x10; the router 8x4.
    assert layer_parameters(moe) == Layer(192, 16, 0, 32, 240)
    shared = 2176 + 8 + 2 * (192 + 16 + 32)
    assert count_parameters(moe, 257) == Parameters(shared + 2 * 960, shared + 2 * 480)


def test_untied_embeddings_count_twice() -> None:
    untied = SMALL.model_copy(update={"tie_embeddings": False})
    difference = count_parameters(untied, 257).total - count_parameters(SMALL, 257).total
    assert difference == 272 * 8


def test_flops_are_six_and_two_per_parameter_and_token() -> None:
    assert training_flops(1.4e9, 5e9) == pytest.approx(4.2e19)
    assert forward_flops(1.4e9, 5e9) == pytest.approx(1.4e19)


def test_the_rows_of_the_paper_have_the_costs_of_the_paper() -> None:
    """Its unit is billions of parameters times billions of tokens."""
    costs = {row.method: row.runs * row.parameters * row.tokens / 1e18 for row in PAPER_COSTS}
    assert costs == pytest.approx({"CLIMB": 1568, "scaling laws": 1200})
