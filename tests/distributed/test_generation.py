"""Decoding from a KV cache writes what whole passes over the texts write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import bare_gpt
from tests.support.run_distributed import run_distributed

LAYOUTS = bare_gpt.LAYOUTS
NOT_KEPT = {"tp2, sequence parallel", "pp2, virtual stages"}
"""Where a token alone does not go on from kept keys."""


def prompts() -> Any:
    """Return texts of many lengths, in micro-batches that no two ranks can share evenly."""
    from megatron_mergemix.evaluate.continuations import Prompt

    lengths = [1, 7, 3, 9, 2, 2, 5, 10, 4, 1, 6]
    found = [Prompt([(3 * n + i) % 60 for i in range(k)], 6) for n, k in enumerate(lengths)]
    return [*found, Prompt([5, 7], 0), Prompt([8], 1)]


def is_done(number: int, tokens: Any) -> bool:
    """Say that some texts end early, each by what is in it."""
    return sum(tokens) % 4 == number % 4


def write_both_ways(home: Path, settings: Any, names: list[str]) -> dict[str, Any]:
    """Write under these layouts from a KV cache, where it serves, and by whole passes."""
    from megatron.core import parallel_state

    from megatron_mergemix.megatron import decoding, generation, kv_cache
    from megatron_mergemix.megatron.dist_checkpoint import load_model
    from megatron_mergemix.megatron.replicas import all_data_ranks
    from megatron_mergemix.megatron.trust import Trust, Trusted

    found = {}
    for name in names:
        bare_gpt.start(LAYOUTS[name][1])
        chunks = bare_gpt.build(settings, LAYOUTS[name][1], tied=True)
        load_model(home / "base" / "iter_0000001", chunks)
        how = prompts(), is_done, 2, 60
        whole = generation.by_whole_passes(chunks, *how, all_data_ranks())
        trust = Trusted().agreed(chunks, kv_cache.serves(chunks), all_data_ranks())
        serves = trust is not Trust.WRONG
        kept = decoding.generate(chunks, *how, all_data_ranks()) if serves else None
        assert all(chunk.training for chunk in chunks)
        found[name] = serves, whole, kept, generation.generate(chunks, *how)
        parallel_state.destroy_model_parallel()
    return found


def save(home: Path, settings: Any) -> None:
    bare_gpt.save_family(home, settings, [])


@pytest.mark.parametrize("kind", ["DENSE", pytest.param("MOE", marks=pytest.mark.nightly)])
def test_a_kv_cache_changes_nothing_but_the_work(tmp_path: Path, kind: str) -> None:
    settings = getattr(bare_gpt, kind)
    run_distributed(save, 1, tmp_path, settings)
    by_layout: dict[str, Any] = {}
    for ranks in (1, 2):
        names = [name for name, (size, _) in LAYOUTS.items() if size == ranks]
        if kind == "MOE":  # which Megatron cuts over tensor ranks with sequence parallelism alone
            names = [name for name in names if name != "tp2"]
        first, *others = run_distributed(write_both_ways, ranks, tmp_path, settings, names)
        assert all(other == first for other in others), "every rank has every text"
        by_layout |= first
    expected = by_layout["alone"][1]
    assert len({len(tokens) for tokens in expected}) > 3, "some end early"
    for name, (serves, whole, kept, written) in by_layout.items():
        assert serves == (name not in NOT_KEPT), name
        assert whole == written == expected, name
        assert kept == (expected if serves else None), name


def write_apart_first(home: Path) -> Any:
    """Write by one replica alone, the other having nothing to write, then by both together."""
    from megatron_mergemix.megatron import generation
    from megatron_mergemix.megatron.dist_checkpoint import load_model
    from megatron_mergemix.megatron.replicas import Replicas

    bare_gpt.start({})
    chunks = bare_gpt.build(bare_gpt.DENSE, {}, tied=True)
    load_model(home / "base" / "iter_0000001", chunks)
    replicas = Replicas()
    with replicas.apart():
        if replicas.own == 0:
            generation.generate(chunks, prompts(), is_done, 2, 60, replicas.data_ranks)
    return generation.generate(chunks, prompts(), is_done, 2, 60, replicas.data_ranks)


def test_replicas_that_have_not_all_written_yet_write_together(tmp_path: Path) -> None:
    run_distributed(save, 1, tmp_path, bare_gpt.DENSE)
    (alone,) = run_distributed(write_both_ways, 1, tmp_path, bare_gpt.DENSE, ["alone"])
    assert run_distributed(write_apart_first, 2, tmp_path) == [alone["alone"][1]] * 2


def write_with_wrong_keys(home: Path, answer: Any) -> Any:
    """Write twice where the KV cache is wrong: other tokens, or logits that are not finite."""
    from megatron_mergemix.megatron import decoding, generation
    from megatron_mergemix.megatron.dist_checkpoint import load_model

    bare_gpt.start({})
    chunks = bare_gpt.build(bare_gpt.DENSE, {}, tied=True)
    load_model(home / "base" / "iter_0000001", chunks)
    calls = []
    right = decoding.generate

    def wrong(chunks: Any, asked: Any, *more: Any) -> Any:
        calls.append(1)
        if answer != "the longest":
            return answer and [[answer] * prompt.max_new_tokens for prompt in asked]
        new = right(chunks, asked, *more)
        assert new is not None
        longest = max(range(len(new)), key=lambda n: len(asked[n].tokens) + len(new[n]))
        new[longest][-1] = (new[longest][-1] + 1) % 60
        return new

    decoding.generate = wrong  # type: ignore[assignment]
    found = [generation.generate(chunks, prompts(), is_done, 2, 60) for _ in range(2)]
    decoding.generate = right
    return found, len(calls)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (59, "answers with another token"),
        ("the longest", "ends 1 of 4 answers with another token"),
        (None, "gives no finite logits"),
    ],
)
def test_a_wrong_kv_cache_is_seen_told_and_not_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], answer: Any, told: str
) -> None:
    run_distributed(save, 1, tmp_path, bare_gpt.DENSE)
    (alone,) = run_distributed(write_both_ways, 1, tmp_path, bare_gpt.DENSE, ["alone"])
    capsys.readouterr()
    for found, num_calls in run_distributed(write_with_wrong_keys, 2, tmp_path, answer):
        assert found == [alone["alone"][1]] * 2
        assert num_calls == 1
    shown = capsys.readouterr().out
    assert shown.count(told) == 1
