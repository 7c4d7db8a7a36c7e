"""Continuations on real ranks: MoE experts, replicas apart, candidates one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import bare_gpt
from tests.support.run_distributed import run_distributed

EXPERTS = ("first", "second")
P2P = {"overlap_p2p_comm": True, "batch_p2p_comm": False}
MOE_LAYOUTS: dict[str, dict[str, Any]] = {
    "ep2": {"expert": 2},
    "ep2, in DDP": {"expert": 2, "ddp": True},
    "tp2 ep2, sequence parallel": {"tensor": 2, "expert": 2, "expert_tensor": 1, "sequence": True},
    "pp2, virtual stages": {"pipeline": 2, "virtual": 2, "settings": P2P},
}
CANDIDATES = [{"first": 0.1 * n, "second": 1.0 - 0.15 * n} for n in range(12)]


def asked(count: int = 23) -> Any:
    """Return requests of many lengths, in micro-batches that no two ranks can share evenly."""
    from megatron_mergemix.evaluate.continuations import Request, prepare

    random = np.random.default_rng(0)
    requests = []
    for _ in range(count):
        length = int(random.integers(2, bare_gpt.LENGTH + 1))
        tokens = random.integers(0, 60, length + 1).tolist()
        cut = int(random.integers(1, length + 1))
        requests.append(Request(tokens[:cut], tokens[cut:]))
    return prepare(requests, max_length=bare_gpt.LENGTH, micro_batch_size=3, vocab_size=60)


def save_family(home: Path, settings: Any) -> list[float]:
    """Save a base and bent copies of it on one rank; return the base's answers."""
    from megatron_mergemix.checkpoint.saves import resolve
    from megatron_mergemix.megatron.continuations import continuation_log_probs
    from megatron_mergemix.megatron.dist_checkpoint import load_model

    chunks = bare_gpt.save_family(home, settings, EXPERTS)
    load_model(resolve(home / "base"), chunks)
    answers: list[float] = continuation_log_probs(chunks, asked())[0].tolist()
    return answers


def answer_moe(home: Path) -> dict[str, Any]:
    from megatron.core import parallel_state

    from megatron_mergemix.megatron.continuations import continuation_log_probs
    from megatron_mergemix.megatron.dist_checkpoint import load_model

    found = {}
    for name, layout in MOE_LAYOUTS.items():
        bare_gpt.start(layout)
        chunks = bare_gpt.build(bare_gpt.MOE, layout, tied=True)
        load_model(home / "base" / "iter_0000001", chunks)
        found[name] = continuation_log_probs(chunks, asked())[0].tolist()
        parallel_state.destroy_model_parallel()
    return found


def test_moe_experts_may_be_spread_over_ranks(tmp_path: Path) -> None:
    (alone,) = run_distributed(save_family, 1, tmp_path, bare_gpt.MOE)
    assert len(set(alone)) > 20
    for found in run_distributed(answer_moe, 2, tmp_path):
        for name, answers in found.items():
            np.testing.assert_allclose(answers, alone, rtol=2e-6, err_msg=name)


def answer_padded(home: Path, step: int) -> tuple[list[float], list[float], set[int]]:
    """Answer with rows as they are, and padded to multiples of a step; return their lengths too."""
    from megatron_mergemix.megatron import continuations, passes
    from megatron_mergemix.megatron.dist_checkpoint import load_model

    bare_gpt.start({})
    chunks = bare_gpt.build(bare_gpt.DENSE, {}, tied=True)
    load_model(home / "base" / "iter_0000001", chunks)
    plain: list[float] = continuations.continuation_log_probs(chunks, asked())[0].tolist()
    passes._length_step = lambda config, micro_batch_size: step
    padded: list[float] = continuations.continuation_log_probs(chunks, asked())[0].tolist()
    lengths = {
        rows.shape[1]
        for group in asked().groups
        for rows in passes.micro_batches_of(group, chunks[0])
    }
    return plain, padded, lengths


def test_rows_that_fp8_has_padded_beyond_the_model_s_length_answer_the_same(family: Path) -> None:
    step = 2 * bare_gpt.LENGTH
    ((plain, padded, lengths),) = run_distributed(answer_padded, 1, family, step)
    assert lengths == {step}
    np.testing.assert_allclose(padded, plain, rtol=2e-6)


def answer_in_blocks(home: Path) -> list[tuple[list[float], list[bool]]]:
    """Answer with all logits at once, then with those of a few rows, and of one row, at a time."""
    from megatron_mergemix.megatron import continuations, logits
    from megatron_mergemix.megatron.dist_checkpoint import load_model

    bare_gpt.start({"tensor": 2})
    chunks = bare_gpt.build(bare_gpt.DENSE, {"tensor": 2}, tied=True)
    load_model(home / "base" / "iter_0000001", chunks)
    found = []
    for size in (logits._LOGITS_AT_ONCE, 7 * bare_gpt.VOCABULARY // 2, 1):
        logits._LOGITS_AT_ONCE = size
        log_probs, greedy = continuations.continuation_log_probs(chunks, asked())
        found.append((log_probs.tolist(), greedy.tolist()))
    return found


def test_logits_that_are_taken_a_few_rows_at_a_time_give_the_same(family: Path) -> None:
    for whole, few, single in run_distributed(answer_in_blocks, 2, family):
        assert whole == few == single


def watch_the_output_layer(home: Path) -> tuple[list[tuple[int, ...]], int]:
    """Answer under TP2; return the shapes that the output layer gave, and the slots asked for."""
    import torch.distributed as dist

    from megatron_mergemix.megatron.continuations import continuation_log_probs
    from megatron_mergemix.megatron.dist_checkpoint import load_model

    layout = {"tensor": 2}
    bare_gpt.start(layout)
    chunks = bare_gpt.build(bare_gpt.DENSE, layout, tied=True)
    load_model(home / "base" / "iter_0000001", chunks)
    layer: Any = chunks[0].output_layer
    shapes: list[tuple[int, ...]] = []
    layer.register_forward_hook(lambda _, args, output: shapes.append(tuple(output[0].shape)))
    continuations = asked()

    def refuse(*_: Any, **options: Any) -> None:
        raise AssertionError("tensors are gathered")

    for name in ("all_gather", "all_gather_into_tensor", "gather", "all_to_all_single"):
        setattr(dist, name, refuse)
    continuation_log_probs(chunks, continuations)
    return shapes, int(continuations.slot_starts[-1])


def test_the_output_layer_sees_the_positions_asked_for_and_no_rank_a_whole_row_of_logits(
    family: Path,
) -> None:
    for shapes, slots in run_distributed(watch_the_output_layer, 2, family):
        assert sum(length * batch for length, batch, _ in shapes) == slots
        assert {columns for *_, columns in shapes} == {bare_gpt.VOCABULARY // 2}
        tokens = sum(rows.numel() for group in asked().groups for rows in group.passes)
        assert slots < tokens / 2


def answer_several_tokens_ahead(scaled: bool) -> tuple[list[float], list[float]]:
    """Answer with a model that also predicts the token after next; return its losses as well.

    Args:
        scaled: whether the logits are scaled behind the output layer, as muP does.
    """
    import torch
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

    from megatron_mergemix.evaluate.continuations import Request, prepare
    from megatron_mergemix.megatron.continuations import continuation_log_probs
    from megatron_mergemix.megatron.dist_checkpoint import unwrap
    from megatron_mergemix.megatron.scoring import sequence_losses

    bare_gpt.start({})
    settings = {**bare_gpt.DENSE, "mtp_num_layers": 1}
    config = bare_gpt._config(settings, {})
    block = get_gpt_mtp_block_spec(config, bare_gpt._spec(config), use_transformer_engine=False)
    chunks = bare_gpt.build(settings, {}, tied=True, model={"mtp_block_spec": block})
    if scaled:
        model: Any = unwrap(chunks[0])
        model._scale_logits = lambda logits: 0.5 * logits
        loss = model.compute_language_model_loss
        model.compute_language_model_loss = lambda labels, logits: loss(labels, 0.5 * logits)
    rows = torch.randint(
        0, 60, (5, bare_gpt.LENGTH + 1), generator=torch.Generator().manual_seed(0)
    )
    requests = [Request(row[:1], row[1:]) for row in rows.tolist()]
    length = bare_gpt.LENGTH
    continuations = prepare(requests, max_length=length, micro_batch_size=2, vocab_size=60)
    log_probs = continuation_log_probs(chunks, continuations)[0]
    return log_probs.tolist(), sequence_losses(chunks, rows, 2).tolist()


@pytest.mark.parametrize("scaled", [False, True])
def test_a_model_that_predicts_several_tokens_answers_by_the_next_one(scaled: bool) -> None:
    ((log_probs, losses),) = run_distributed(answer_several_tokens_ahead, 1, scaled)
    np.testing.assert_allclose(log_probs, [-loss for loss in losses], rtol=2e-6)


def resident(home: Path, layout: Any, with_replicas: bool) -> Any:
    from megatron_mergemix.megatron.replicas import Replicas
    from megatron_mergemix.megatron.resident import ResidentProxy

    bare_gpt.start(layout)
    chunks = bare_gpt.build(bare_gpt.DENSE, layout, tied=True)
    folder = "iter_0000001"
    return ResidentProxy(
        chunks,
        home / "base" / folder,
        {name: home / name / folder for name in EXPERTS},
        replicas=Replicas() if with_replicas else None,
    )


def answers(proxy: Any) -> Any:
    """Return the proxy's answers to requests and prompts, as plain numbers."""
    from megatron_mergemix.evaluate.continuations import Prompt

    log_probs, greedy = proxy.continuation_log_probs(asked())
    prompts = [Prompt([5, 7, n], 4 if n else 6) for n in range(5)]
    written = proxy.generate(
        prompts, lambda n, new: sum(new) % 5 == n, micro_batch_size=2, vocab_size=60
    )
    return log_probs.tolist(), greedy.tolist(), written


def one_after_the_other(home: Path, numbers: list[int]) -> dict[int, Any]:
    """Merge and answer these candidates in this order, in this process."""
    proxy = resident(home, {}, with_replicas=False)
    found = {}
    for number in numbers:
        proxy.apply(CANDIDATES[number])
        found[number] = answers(proxy)
    return found


def together_and_apart(home: Path) -> tuple[Any, Any]:
    """Answer the first two candidates with both ranks, then each on a replica of its own."""
    proxy = resident(home, {}, with_replicas=True)
    together = []
    for candidate in CANDIDATES[:2]:
        proxy.apply(candidate)
        together.append(answers(proxy))
    with proxy.replicas.apart():
        proxy.apply(CANDIDATES[proxy.replicas.own])
        own = answers(proxy)
    return together, proxy.replicas.gather(own)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("family")
    run_distributed(save_family, 1, home, bare_gpt.DENSE)
    return home


def test_twelve_candidates_in_one_process_answer_as_in_twelve_fresh_ones(family: Path) -> None:
    order = list(range(12))
    (found,) = run_distributed(one_after_the_other, 1, family, order)
    for number in order:
        (alone,) = run_distributed(one_after_the_other, 1, family, [number])
        assert alone[number] == found[number]
    assert len({tuple(log_probs) for log_probs, *_ in found.values()}) == 12
    assert len({len(tokens) for tokens in found[0][2]}) > 1, "prompts must end at different steps"


def test_replicas_apart_answer_bit_for_bit_as_all_ranks_together(family: Path) -> None:
    first, second = run_distributed(together_and_apart, 2, family)
    together, apart = first
    assert apart == together
    assert second == first
    assert together[0] != together[1]


def generate_from_nan(home: Path) -> str:
    """Break one tensor-parallel rank's weights; every rank must say so."""
    import torch

    from megatron_mergemix.errors import EvaluationError
    from megatron_mergemix.megatron.dist_checkpoint import unwrap

    proxy = resident(home, {"tensor": 2}, with_replicas=False)
    if torch.distributed.get_rank() == 1:
        with torch.no_grad():
            unwrap(proxy.chunks[0]).embedding.word_embeddings.weight[3] = float("nan")
    log_probs, greedy = proxy.continuation_log_probs(asked())
    assert not log_probs.isfinite().any()
    assert not greedy.any()
    try:
        answers(proxy)
    except EvaluationError as error:
        return str(error)
    return "no error"


def test_broken_weights_are_a_failed_candidate_on_all_ranks(family: Path) -> None:
    for message in run_distributed(generate_from_nan, 2, family):
        assert "the logits are not finite while an answer is generated" in message
