"""Choices that share a context are answered as each by itself, for less work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import bare_gpt
from tests.support.row_tokens import num_tokens
from tests.support.run_distributed import run_distributed

LAYOUTS = {**bare_gpt.LAYOUTS, "tp2 pp2": (4, {"tensor": 2, "pipeline": 2})}
MOE_LAYOUTS = {
    "alone": (1, {}),
    "ep2": (2, {"expert": 2}),
    "pp2": (2, {"pipeline": 2}),
    "tp2, sequence parallel": (2, {"tensor": 2, "sequence": True}),
    "pp2 ep2": (4, {"pipeline": 2, "expert": 2}),
    "dp4, ep2 within": (4, {"expert": 2}),
}
NOT_SHARED = {"pp2, virtual stages"}

KINDS: dict[str, Any] = {"DENSE": LAYOUTS, "MOE": MOE_LAYOUTS}


def asked() -> Any:
    """Return questions whose contexts, choices and numbers of choices are of many lengths."""
    from megatron_mergemix.evaluate import families
    from megatron_mergemix.evaluate.continuations import Request, prepare
    from megatron_mergemix.megatron import continuations

    families._LEAST_SHARED = 3  # the model sees 16 tokens
    # So few tokens in all that padding would decide.
    continuations.work = lambda chunk, asked: num_tokens(asked)  # type: ignore[assignment]
    random = np.random.default_rng(0)
    requests = []
    for length in (3, 12, 5, 9, 2, 7, 7, 11, 4, 10, 6):
        context = random.integers(0, 60, length).tolist()
        for _ in range(int(random.integers(1, 5))):
            choice = random.integers(0, 60, int(random.integers(1, 5))).tolist()
            requests.append(Request(context, choice))
    return prepare(requests, max_length=bare_gpt.LENGTH, micro_batch_size=2, vocab_size=60)


def save(home: Path, settings: Any) -> None:
    bare_gpt.save_family(home, settings, [])


def build(home: Path, settings: Any, layout: Any) -> Any:
    from megatron_mergemix.megatron.dist_checkpoint import load_model

    bare_gpt.start(layout)
    chunks = bare_gpt.build(settings, layout, tied=True)
    load_model(home / "base" / "iter_0000001", chunks)
    return chunks


def by_rows() -> Any:
    """Return the same questions, every row run by itself."""
    from dataclasses import replace

    return replace(asked(), shared=None)


def answer(home: Path, kind: str, world_size: int) -> dict[str, Any]:
    """Answer both ways; return whether contexts were shared, answers, and tokens that were run."""
    from megatron.core import parallel_state

    from megatron_mergemix.megatron import continuations
    from megatron_mergemix.megatron.dist_checkpoint import unwrap
    from megatron_mergemix.megatron.trust import Trust

    found = {}
    for name, (ranks, layout) in KINDS[kind].items():
        if ranks != world_size:
            continue
        chunks = build(home, getattr(bare_gpt, kind), layout)
        tokens = [0]
        model: Any = unwrap(chunks[0])

        def count(layer: Any, inputs: Any, output: Any, tokens: list[int] = tokens) -> None:
            tokens[0] += output.shape[0] * output.shape[1]

        model.decoder.layers[0].register_forward_hook(
            lambda layer, inputs, output, count=count: count(layer, inputs, output[0])
        )
        both = []
        # The first time some are tried both ways.
        for questions in (by_rows(), asked(), asked()):
            tokens[0] = 0
            log_probs, greedy = continuations.continuation_log_probs(chunks, questions)
            both.append((log_probs.tolist(), greedy.tolist(), tokens[0]))
        assert all(chunk.training for chunk in chunks)
        assert "forward" not in vars(model.decoder.layers[0].self_attention.core_attention)
        found[name] = continuations._trusted.own(chunks) is Trust.RIGHT, *both
        parallel_state.destroy_model_parallel()
    return found


@pytest.mark.parametrize(
    ("kind", "ranks"),
    [
        *(("DENSE", 1), ("DENSE", 2), ("MOE", 1), ("MOE", 2)),
        *(pytest.param(kind, 4, marks=pytest.mark.nightly) for kind in ("DENSE", "MOE")),
    ],
)
def test_answers_are_those_of_every_choice_by_itself_under_every_layout(
    tmp_path: Path, kind: str, ranks: int
) -> None:
    run_distributed(save, 1, tmp_path, getattr(bare_gpt, kind))
    (alone,) = run_distributed(answer, 1, tmp_path, kind, 1)
    expected = alone["alone"][1]
    first, *others = run_distributed(answer, ranks, tmp_path, kind, ranks)
    for other in others:
        for name, (_, *every) in other.items():
            assert [each[:2] for each in every] == [each[:2] for each in first[name][1:]], name
    for name, (shares, rows, tried, again) in first.items():
        assert shares == (name not in NOT_SHARED), name
        assert tried[:2] == again[:2], "the first candidate is scored as all others"
        np.testing.assert_allclose(rows[0], expected[0], rtol=3e-6, err_msg=name)
        np.testing.assert_allclose(again[0], expected[0], rtol=3e-6, err_msg=name)
        assert again[1] == expected[1], name
        if not shares:
            assert again == tried == rows, name
        else:  # less work only where padding does not decide, but not the same
            assert rows[2] != again[2] < tried[2], name


def test_data_parallel_ranks_change_no_bit(tmp_path: Path) -> None:
    run_distributed(save, 1, tmp_path, bare_gpt.DENSE)
    (alone,) = run_distributed(answer, 1, tmp_path, "DENSE", 1)
    two, _ = run_distributed(answer, 2, tmp_path, "DENSE", 2)
    assert two["dp2"][3][:2] == two["dp2, in DDP"][3][:2] == alone["alone"][3][:2]


def answer_with_wrong_attention(home: Path, wrong: str) -> Any:
    """Answer twice where tokens behind kept keys see others than those before them."""
    from megatron_mergemix.megatron import kv_cache
    from megatron_mergemix.megatron.continuations import continuation_log_probs

    chunks = build(home, bare_gpt.DENSE, {})
    expected = continuation_log_probs(chunks, by_rows())[0].tolist()
    assert not asked().shared.goes_on.all(), "first tokens are read from contexts alone"
    calls = []
    right = kv_cache.causal_lower_right

    def attend(*sizes: int) -> Any:
        import torch

        calls.append(1)
        if wrong == "all are seen":
            return torch.zeros(sizes)
        if wrong == "the first ones are seen":
            return torch.ones(sizes, dtype=torch.bool).tril()
        return torch.full(sizes, torch.nan)

    kv_cache.causal_lower_right = attend
    found = [continuation_log_probs(chunks, asked())[0].tolist()]
    tried = len(calls)
    found.append(continuation_log_probs(chunks, asked())[0].tolist())
    kv_cache.causal_lower_right = right
    return found == [expected] * 2, 0 < tried == len(calls)


@pytest.mark.parametrize("wrong", ["all are seen", "the first ones are seen", "no number"])
def test_shared_contexts_that_answer_otherwise_are_seen_told_and_not_used(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], wrong: str
) -> None:
    run_distributed(save, 1, tmp_path, bare_gpt.DENSE)
    capfd.readouterr()
    for is_right, is_tried_once in run_distributed(answer_with_wrong_attention, 2, tmp_path, wrong):
        assert is_right
        assert is_tried_once
    told = capfd.readouterr().out
    assert told.count("warning: choices that share their context differ by") == 1
    assert "every choice costs a pass over its whole text" in told


def answer_broken_first(home: Path) -> Any:
    """Answer with weights that are no numbers, then with the right ones."""
    import torch

    from megatron_mergemix.megatron import continuations
    from megatron_mergemix.megatron.dist_checkpoint import load_model
    from megatron_mergemix.megatron.trust import Trust

    chunks = build(home, bare_gpt.DENSE, {})
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.fill_(torch.nan)
    broken = continuations.continuation_log_probs(chunks, asked())[0]
    known = continuations._trusted.own(chunks) is not Trust.UNTRIED
    load_model(home / "base" / "iter_0000001", chunks)
    found = continuations.continuation_log_probs(chunks, asked())[0]
    assert continuations._trusted.own(chunks) is Trust.RIGHT
    rows = continuations.continuation_log_probs(chunks, by_rows())[0]
    return bool(broken.isnan().all()), known, (found - rows).abs().max().item()


def test_a_broken_candidate_says_nothing_about_sharing(tmp_path: Path) -> None:
    run_distributed(save, 1, tmp_path, bare_gpt.DENSE)
    ((is_broken, known, gap),) = run_distributed(answer_broken_first, 1, tmp_path)
    assert (is_broken, known) == (True, False)
    assert gap < 1e-4


def answer_apart_first(home: Path) -> Any:
    """Answer by one replica alone, then by both together."""
    from megatron_mergemix.megatron.continuations import continuation_log_probs
    from megatron_mergemix.megatron.replicas import Replicas

    chunks = build(home, bare_gpt.DENSE, {})
    replicas = Replicas()
    with replicas.apart():
        if replicas.own == 0:
            continuation_log_probs(chunks, asked(), replicas.data_ranks)
    return continuation_log_probs(chunks, asked(), replicas.data_ranks)[0].tolist()


def test_replicas_that_have_not_all_scored_yet_score_together(tmp_path: Path) -> None:
    run_distributed(save, 1, tmp_path, bare_gpt.DENSE)
    (alone,) = run_distributed(answer, 1, tmp_path, "DENSE", 1)
    assert run_distributed(answer_apart_first, 2, tmp_path) == [alone["alone"][3][0]] * 2


def answer_in_half() -> tuple[bool, float]:
    """Answer in bf16; return whether contexts were shared, and the largest gap of a choice."""
    import torch
    from megatron.core.transformer.module import Float16Module

    from megatron_mergemix.megatron import continuations
    from megatron_mergemix.megatron.dist_checkpoint import unwrap
    from megatron_mergemix.megatron.trust import Trust

    half = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
    bare_gpt.start({})
    (chunk,) = bare_gpt.build({**bare_gpt.DENSE, **half}, {}, tied=True)
    model: Any = unwrap(chunk)
    chunks: list[torch.nn.Module] = [Float16Module(model.config, chunk)]
    found = continuations.continuation_log_probs(chunks, asked())[0]
    rows = continuations.continuation_log_probs(chunks, by_rows())[0]
    is_right = continuations._trusted.own(chunks) is Trust.RIGHT
    return is_right, (found - rows).abs().max().item()


def test_in_16_bits_rounding_is_no_mistake() -> None:
    ((is_right, gap),) = run_distributed(answer_in_half, 1)
    assert is_right
    assert gap < 0.2
