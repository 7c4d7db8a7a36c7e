"""Memory per rank, against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_mergemix.config import Config
from megatron_mergemix.plan.memory import (
    SearchMemory,
    TrainingMemory,
    layer_activation_bytes,
    search_memory,
    stage_parameters,
    training_memory,
)

VOCAB = 257


def config_of(*, parallel: dict[str, Any] | None = None, batch: int = 8, **model: Any) -> Config:
    return Config.model_validate(
        {
            "run_dir": "unused",
            "model": {
                "num_layers": 2,
                "hidden_size": 8,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "ffn_hidden_size": 20,
                "seq_length": 10,
                "make_vocab_size_divisible_by": 16,
                **model,
            },
            "parallel": parallel or {},
            "training": {"global_batch_size": batch, "micro_batch_size": 2},
            "base": {"checkpoint": "unused"},
            "domains": {name: {"prefixes": [name]} for name in ("a", "b", "c")},
            "evaluate": {
                "capabilities": {"a": {"loss": {"prefixes": ["h"]}}},
                "micro_batch_size": 4,
            },
        }
    )


def stages(config: Config) -> list[tuple[int, int]]:
    assert config.model is not None
    return [
        stage_parameters(config.model, config.parallel, VOCAB, stage)
        for stage in range(config.parallel.pipeline)
    ]


# ---- parameters; a whole model is 2176 (272 rows) + 2 layers of 192 + 16 + 480 + a norm of 8 ----


def test_one_rank_holds_the_whole_model() -> None:
    assert stages(config_of()) == [(2176 + 2 * 688 + 8, 0)]


def test_tensor_parallelism_cuts_everything_but_norms() -> None:
    assert stages(config_of(parallel={"processes": 2, "tensor": 2})) == [
        (1088 + 2 * (96 + 16 + 240) + 8, 0)
    ]


def test_every_rank_keeps_one_key_value_head_when_there_are_fewer_than_ranks() -> None:
    # 2 of 8 query channels, keys and values of one head of 2 channels: 8x2 + 8x4, output 2x8.
    assert stages(config_of(parallel={"processes": 4, "tensor": 4})) == [
        (544 + 2 * (64 + 16 + 120) + 8, 0)
    ]


def test_tied_embeddings_are_on_the_first_and_the_last_stage() -> None:
    parallel = {"processes": 2, "pipeline": 2}
    assert stages(config_of(parallel=parallel)) == [(2176 + 688, 0), (688 + 8 + 2176, 0)]


def test_untied_embeddings_are_two_tables() -> None:
    assert stages(config_of(tie_embeddings=False)) == [(2 * 2176 + 2 * 688 + 8, 0)]


def test_expert_parallelism_deals_out_the_moe_experts() -> None:
    moe = {"num_moe_experts": 4, "moe_ffn_hidden_size": 10}
    assert stages(config_of(parallel={"processes": 2, "expert": 2}, **moe)) == [
        (2176 + 2 * (192 + 16 + 32) + 8, 2 * 2 * 240)
    ]


# ---- activations ----


def test_the_tensors_a_layer_keeps_per_token() -> None:
    config = config_of()
    assert config.model is not None
    # 4 inputs of 8; queries 8, keys and values 8, output 8; 2 x 4 heads x 10 positions of
    # attention; gate, up and their product 3 x 20; in fp32.
    assert layer_activation_bytes(config.model, config.parallel) == (32 + 24 + 80 + 60) * 4


def test_tensor_parallelism_does_not_cut_the_inputs_of_blocks() -> None:
    config = config_of(parallel={"processes": 2, "tensor": 2}, precision="bf16")
    assert config.model is not None
    assert layer_activation_bytes(config.model, config.parallel) == (32 + 164 // 2) * 2


def test_a_moe_layer_keeps_the_copies_it_sends_to_the_chosen_experts() -> None:
    config = config_of(num_moe_experts=4, moe_top_k=2, moe_ffn_hidden_size=10)
    assert config.model is not None
    # 2 x 2 copies of 8; 2 x 3 x 10 inside of the experts.
    assert layer_activation_bytes(config.model, config.parallel) == (32 + 32 + 104 + 60) * 4


# ---- training ----


def test_training_in_fp32_needs_sixteen_bytes_per_parameter() -> None:
    # 2 sequences of 10 tokens; 2 layers of 784 bytes, 272 logits of 4 + 8 bytes.
    assert training_memory(config_of(), VOCAB) == TrainingMemory(
        weights=3560 * 4,
        gradients=3560 * 4,
        optimizer=3560 * 8,
        activations=20 * (2 * 784 + 272 * 12),
    )


def test_training_in_bf16_keeps_fp32_gradients_and_masters() -> None:
    memory = training_memory(config_of(precision="bf16"), VOCAB)
    assert (memory.weights, memory.gradients, memory.optimizer) == (7120, 14240, 3560 * 12)
    assert memory.total == 3560 * 18 + memory.activations


@pytest.mark.parametrize(("distributed", "divisor"), [(False, 1), (True, 4)])
def test_the_distributed_optimizer_spreads_states_over_data_ranks(
    distributed: bool, divisor: int
) -> None:
    parallel = {"processes": 4, "distributed_optimizer": distributed}
    memory = training_memory(config_of(parallel=parallel), VOCAB)
    assert memory.optimizer == 3560 * 8 // divisor
    assert memory.weights == 3560 * 4


def test_states_of_moe_experts_are_spread_over_fewer_ranks() -> None:
    parallel = {"processes": 4, "expert": 2, "distributed_optimizer": True}
    config = config_of(parallel=parallel, num_moe_experts=4, moe_ffn_hidden_size=10)
    dense, moe = 2664, 960
    assert stages(config) == [(dense, moe)]
    assert training_memory(config, VOCAB).optimizer == dense * 8 // 4 + moe * 8 // 2


def test_the_first_of_two_stages_keeps_two_micro_batches() -> None:
    config = config_of(parallel={"processes": 2, "pipeline": 2}, num_layers=16)
    # The first stage holds 2 x 8 layers of activations; the last 1 x 8 and the logits, less.
    assert training_memory(config, VOCAB).activations == 20 * 16 * 784
    one = config_of(parallel={"processes": 2, "pipeline": 2}, num_layers=16, batch=2)
    assert training_memory(one, VOCAB).activations == 20 * (8 * 784 + 272 * 12)


# ---- search ----


def test_the_search_holds_base_and_experts_beside_the_live_model() -> None:
    # 4 copies (base and 3 experts); 4 sequences of 10 tokens, whose logits exceed a layer.
    assert search_memory(config_of(), VOCAB) == SearchMemory(
        live=3560 * 4, base_and_experts=4 * 3560 * 4, activations=40 * 272 * 12
    )


def test_a_search_that_differentiates_needs_gradients_and_the_activations_of_training() -> None:
    config = config_of(precision="bf16", parallel={"processes": 2, "pipeline": 2})
    plain = search_memory(config, VOCAB)
    search = config.search.model_copy(update={"strategy": "gradient"})
    memory = search_memory(config.model_copy(update={"search": search}), VOCAB)
    # The last stage: 688 + 8 + 2176 parameters, one layer of 392 bytes and its logits.
    assert (memory.live, memory.base_and_experts) == (plain.live, plain.base_and_experts)
    assert memory.gradients == 2872 * 4
    assert memory.activations == 40 * (392 + 272 * 10)
    assert memory.total == plain.total - plain.activations + memory.activations + 2872 * 4


def test_tasks_keep_keys_and_values_of_two_micro_batches_per_stage() -> None:
    config = config_of(parallel={"processes": 4, "tensor": 2, "pipeline": 2}, precision="bf16")
    assert search_memory(config, VOCAB).kv_cache == 0
    capabilities = {"a": {"lm_eval": {"tasks": ["gsm8k"]}}}
    evaluate = config.evaluate.model_validate({"capabilities": capabilities, "micro_batch_size": 4})
    memory = search_memory(config.model_copy(update={"evaluate": evaluate}), VOCAB)
    # 2 micro-batches of 4 x 10 tokens; one layer's keys and values: one group of 2 channels.
    assert memory.kv_cache == 4 * 40 * (2 * 2) * 2
    assert memory.total == search_memory(config, VOCAB).total + memory.kv_cache


def test_the_search_in_bf16_needs_half_of_it() -> None:
    memory = search_memory(config_of(precision="bf16"), VOCAB)
    assert (memory.live, memory.base_and_experts) == (7120, 4 * 7120)
    assert memory.total == 5 * 7120 + 40 * 272 * 10
