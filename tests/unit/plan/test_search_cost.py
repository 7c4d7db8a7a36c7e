"""Seconds and hours of a search, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_mergemix.config import Model, Parallel
from megatron_mergemix.errors import MergeMixError
from megatron_mergemix.plan.hardware import GPUS, Gpu
from megatron_mergemix.plan.outlook import SCALE
from megatron_mergemix.plan.search_cost import (
    RUNTIME_BYTES,
    Efficiency,
    Workload,
    evaluate_seconds,
    merge_seconds,
    room_of,
    search_cost,
    sensible_layout,
)

# 2 layers of 688 parameters, 272 rows of 8, a norm of 8: 3,560, as in test_cost and test_memory.
MODEL = Model(
    num_layers=2,
    hidden_size=8,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=20,
    seq_length=10,
    make_vocab_size_divisible_by=16,
)
GPU = Gpu(
    "round",
    bf16=1e9,
    fp32=1e6,
    bandwidth=1e6,
    memory=3e9,
    host_link=1e4,
    host_memory=1e9,
    file_read=1e3,
)
WHOLE = Efficiency(matmul=1.0, training=1.0, merge=1.0, activations=1.0, link=1.0)

# Of 4 windows of 10 tokens: 2 x 3,560 per token, and in each of 2 layers 4 x 8 x 10 of attention.
FLOPS = 40 * (2 * 3560 + 2 * 4 * 8 * 10)
# Written and read once: 2 layers of 784 bytes per token, 272 logits of 12 bytes.
MOVED = 2 * 40 * (2 * 784 + 272 * 12)


def work(*, model: dict[str, Any] | None = None, **changes: Any) -> Workload:
    """A search of 20 models on 8 windows by one rank."""
    settings: dict[str, Any] = {
        "model": MODEL.model_copy(update=model or {}),
        "vocab_size": 257,
        "parallel": Parallel(),
        "experts": 3,
        "models": 20,
        "sequences": 8,
        "micro_batch_size": 4,
        "resident": "auto",
        "expert_tokens": 1000.0,
    }
    return Workload(**{**settings, **changes})


def data(ranks: int) -> Parallel:
    return Parallel(processes=ranks)


# ---- merging ----


def test_a_merge_on_the_device_reads_the_experts_and_writes_the_live_weights() -> None:
    assert merge_seconds(1000, 3, "device", GPU, WHOLE) == pytest.approx(4000 / 1e6)


def test_copies_from_the_host_pass_the_link_and_a_buffer() -> None:
    expected = 3000 / 1e4 + (4000 + 3000) / 1e6
    assert merge_seconds(1000, 3, "host", GPU, WHOLE) == pytest.approx(expected)


def test_copies_in_a_file_come_as_fast_as_the_disk_reads() -> None:
    expected = 3000 / 1e3 + (4000 + 3000) / 1e6
    assert merge_seconds(1000, 3, "file", GPU, WHOLE) == pytest.approx(expected)


def test_what_is_reached_divides_each_part() -> None:
    reached = Efficiency(merge=0.5, link=0.25)
    expected = 3000 / 0.25e4 + 7000 / 0.5e6
    assert merge_seconds(1000, 3, "host", GPU, reached) == pytest.approx(expected)


def test_every_expert_and_every_byte_makes_a_merge_longer() -> None:
    for place in ("device", "host", "file"):
        times = [merge_seconds(1000, experts, place, GPU) for experts in (1, 2, 9)]  # type: ignore[arg-type]
        assert times == sorted(times)
        assert len(set(times)) == 3
        twice = merge_seconds(2000, 9, place, GPU)  # type: ignore[arg-type]
        assert twice == pytest.approx(2 * times[-1])


# ---- evaluating ----


def test_a_forward_pass_multiplies_and_moves_activations() -> None:
    expected = 2 * (FLOPS / 1e6 + MOVED / 1e6)  # 8 windows are 2 micro-batches
    assert evaluate_seconds(work(), GPU, WHOLE) == pytest.approx(expected)


def test_the_peak_is_that_of_the_models_precision() -> None:
    bf16 = work(model={"precision": "bf16"})
    logits_and_layers = 2 * 40 * (2 * 784 / 2 + 272 * (2 + 8))
    expected = 2 * (FLOPS / 1e9 + logits_and_layers / 1e6)
    assert evaluate_seconds(bf16, GPU, WHOLE) == pytest.approx(expected)


def test_an_embedding_that_is_only_looked_up_is_not_multiplied() -> None:
    untied = work(model={"tie_embeddings": False})
    assert evaluate_seconds(untied, GPU) == pytest.approx(evaluate_seconds(work(), GPU))


def test_replicas_share_windows_in_whole_micro_batches() -> None:
    one, two, eight = (evaluate_seconds(work(), GPU, sharing=count) for count in (1, 2, 8))
    assert one == pytest.approx(2 * two)
    assert two == eight


def test_ranks_that_share_moe_experts_have_windows_of_their_own() -> None:
    moe = {"num_moe_experts": 4}
    spread = work(model=moe, parallel=Parallel(processes=4, expert=4), sequences=64)
    alone = work(model=moe, parallel=Parallel(processes=4), sequences=64)
    assert (spread.replicas, alone.replicas) == (1, 4)
    seconds = [search_cost(each, GPU).evaluate_seconds for each in (spread, alone)]
    assert seconds[0] == pytest.approx(evaluate_seconds(spread, GPU, sharing=4))
    assert seconds[1] == pytest.approx(evaluate_seconds(alone, GPU))  # four at a time


def test_a_pipeline_waits_for_its_last_stage() -> None:
    parallel = Parallel(processes=2, pipeline=2)
    half = (FLOPS + MOVED) / 2 / 1e6
    assert evaluate_seconds(work(parallel=parallel), GPU, WHOLE) == pytest.approx((2 + 1) * half)


def test_tensor_parallelism_divides_the_products_but_not_the_inputs_of_blocks() -> None:
    parallel = Parallel(processes=2, tensor=2)
    moved = 2 * 40 * (2 * (32 + 164 // 2) * 4 + 136 * 12)
    expected = 2 * (FLOPS / 2 + moved) / 1e6
    assert evaluate_seconds(work(parallel=parallel), GPU, WHOLE) == pytest.approx(expected)


# ---- the whole search ----


def test_a_search_on_one_rank_is_its_candidates_one_after_the_other() -> None:
    cost = search_cost(work(), GPU, WHOLE)
    # base and 3 experts in fp32; the last stage keeps the logits of 40 tokens.
    assert (cost.live, cost.copies, cost.activations) == (3560 * 4, 4 * 3560 * 4, 40 * 272 * 12)
    assert (cost.place, cost.fits, cost.replicas, cost.at_once) == ("device", True, 1, 1)
    each = 4 * 3560 * 4 / 1e6 + 2 * (FLOPS + MOVED) / 1e6
    assert cost.merge_seconds + cost.evaluate_seconds == pytest.approx(each)
    assert cost.candidate_seconds == pytest.approx(each)
    assert cost.search_hours == pytest.approx(20 * each / 3600)
    assert cost.experts_hours == pytest.approx(6 * 3560 * 1000 / 1e6 / 3600)


def test_given_experts_take_no_hours() -> None:
    assert search_cost(work(expert_tokens=0), GPU).experts_hours is None


def test_replicas_score_different_candidates_where_windows_cannot_be_shared() -> None:
    few = work(sequences=4, parallel=data(4))  # one micro-batch
    cost = search_cost(few, GPU, WHOLE)
    assert (cost.replicas, cost.at_once) == (4, 4)
    alone = search_cost(work(sequences=4), GPU, WHOLE)
    assert cost.candidate_seconds == pytest.approx(alone.candidate_seconds / 4)


def test_replicas_share_the_windows_of_one_candidate_where_there_are_few_candidates() -> None:
    cost = search_cost(work(models=3, sequences=32, parallel=data(8)), GPU, WHOLE)
    assert (cost.replicas, cost.at_once) == (8, 1)
    assert cost.evaluate_seconds == pytest.approx((FLOPS + MOVED) / 1e6)


def test_the_last_round_of_candidates_counts_whole() -> None:
    cost = search_cost(work(models=5, sequences=4, parallel=data(4)), GPU, WHOLE)
    alone = cost.merge_seconds + cost.evaluate_seconds
    assert cost.search_hours == pytest.approx(2 * alone / 3600)


def test_ranks_that_share_moe_experts_are_one_replica() -> None:
    moe = {"num_moe_experts": 4, "moe_ffn_hidden_size": 10}
    cost = search_cost(work(model=moe, parallel=Parallel(processes=4, expert=2)), GPU)
    assert cost.replicas == 2


def test_more_windows_trials_tokens_and_slower_gpus_take_longer() -> None:
    plain = search_cost(work(), GPU)
    assert search_cost(work(sequences=80), GPU).search_hours > plain.search_hours
    assert search_cost(work(models=40), GPU).search_hours == pytest.approx(2 * plain.search_hours)
    assert search_cost(work(experts=9), GPU).merge_seconds > plain.merge_seconds
    more_tokens = search_cost(work(expert_tokens=3000.0), GPU).experts_hours
    assert more_tokens == pytest.approx(3 * (plain.experts_hours or 0.0))
    slow = replace(GPU, fp32=GPU.fp32 / 2, bandwidth=GPU.bandwidth / 2)
    assert search_cost(work(), slow).search_hours == pytest.approx(2 * plain.search_hours)


# ---- where the copies lie ----


def test_a_rank_fills_what_the_search_would_fill() -> None:
    room = room_of(GPU, taken=10**8)
    assert room.device == int(3e9 * 0.85 - RUNTIME_BYTES - 1e8)
    assert room.host == int(1e9 * 0.85)


def place_of(gpu: Gpu, **changes: Any) -> str:
    return search_cost(work(**changes), gpu).place


def test_copies_move_to_the_host_and_to_a_file_as_memories_shrink() -> None:
    live, copies, activations = 3560 * 4, 4 * 3560 * 4, 40 * 272 * 12
    just = (RUNTIME_BYTES + live + activations + copies + 1) / 0.85
    assert place_of(replace(GPU, memory=just)) == "device"
    assert place_of(replace(GPU, memory=just - 100)) == "host"
    assert place_of(replace(GPU, memory=just - 100, host_memory=copies / 0.85 + 1)) == "host"
    assert place_of(replace(GPU, memory=just - 100, host_memory=copies / 0.86)) == "file"


def test_copies_make_room_for_a_pass_and_for_gradients() -> None:
    assert place_of(GPU) == "device"
    assert place_of(GPU, micro_batch_size=60_000) == "host", "2 GB of logits"
    longest = 3e9 * 0.85 - RUNTIME_BYTES - 5 * 3560 * 4
    fits = int(longest // (10 * 272 * 12))  # windows of 10 tokens
    assert place_of(GPU, micro_batch_size=fits) == "device"
    assert place_of(GPU, micro_batch_size=fits, differentiates=True) == "host"


def test_slower_places_make_a_search_longer() -> None:
    hours = [search_cost(work(resident=place), GPU).search_hours for place in PLACES]
    assert hours == sorted(hours)
    assert hours[0] < hours[1] < hours[2]


PLACES = ("device", "host", "file")


def test_a_wish_that_does_not_fit_is_refused_as_the_search_refuses_it() -> None:
    with pytest.raises(MergeMixError, match="search.resident is device, but base and experts take"):
        search_cost(work(resident="device"), replace(GPU, memory=RUNTIME_BYTES))


def test_activations_that_find_no_room_are_told() -> None:
    live, activations = 3560 * 4, 40 * 272 * 12
    needed = RUNTIME_BYTES + live + activations
    assert search_cost(work(resident="host"), replace(GPU, memory=needed)).fits
    assert not search_cost(work(resident="host"), replace(GPU, memory=needed - 1)).fits


# ---- models of 8B and 70B ----


def scaled(name: str, experts: int, gpus: int) -> Workload:
    model = SCALE[name]
    assert model.vocab_size is not None
    settings = work(experts=experts, parallel=Parallel(processes=gpus))
    return replace(settings, model=model, vocab_size=model.vocab_size)


@pytest.mark.parametrize(("name", "billions"), [("8B", 8.03), ("70B", 70.55)])
def test_the_shapes_are_those_of_llama_3(name: str, billions: float) -> None:
    cost = search_cost(scaled(name, 4, 64), GPUS["b200"])
    assert cost.parameters / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize("gpu", ["a100-80g", "h100", "h200", "b200"])
@pytest.mark.parametrize(("name", "experts"), [("8B", 4), ("8B", 16), ("70B", 4), ("70B", 16)])
def test_a_layout_on_64_gpus_holds_everything_on_the_device(
    name: str, experts: int, gpu: str
) -> None:
    wanted = scaled(name, experts, 64)
    layout = sensible_layout(wanted, GPUS[gpu])
    assert layout is not None
    cost = search_cost(replace(wanted, parallel=layout), GPUS[gpu])
    assert (cost.place, cost.fits) == ("device", True)
    assert layout.tensor == 8 or layout.pipeline == 1
    if layout.tensor > 1:  # half of the ranks would not do
        half = layout.model_copy(update={"tensor": layout.tensor // 2})
        smaller = search_cost(replace(wanted, parallel=half), GPUS[gpu])
        assert smaller.place != "device" or not smaller.fits or half.tensor * half.pipeline >= 8


def test_a_search_that_differentiates_gets_a_layout_with_room_for_gradients() -> None:
    plain = scaled("8B", 4, 64)
    gradients = replace(plain, differentiates=True)
    smaller, layout = (sensible_layout(work, GPUS["h100"]) for work in (plain, gradients))
    assert smaller is not None
    assert layout is not None
    assert search_cost(replace(gradients, parallel=smaller), GPUS["h100"]).place != "device"
    cost = search_cost(replace(gradients, parallel=layout), GPUS["h100"])
    assert (cost.place, cost.fits) == ("device", True)


def test_a_machine_that_is_too_small_spreads_the_copies_over_its_ranks() -> None:
    layout = sensible_layout(scaled("70B", 16, 8), GPUS["a100-80g"])
    assert layout is not None
    assert (layout.tensor, layout.pipeline) == (8, 1)
    cost = search_cost(replace(scaled("70B", 16, 8), parallel=layout), GPUS["a100-80g"])
    assert cost.place == "file"


def test_no_layout_is_found_where_the_live_weights_have_no_room() -> None:
    assert sensible_layout(scaled("70B", 4, 1), GPUS["h100"]) is None
