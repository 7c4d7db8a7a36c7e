"""How the engine goes about its work: in file order, reading and writing at once."""

from __future__ import annotations

import math
import os
import threading
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from megatron_mergemix.merge import engine
from megatron_mergemix.merge.checkpoints import Settings, merge_checkpoints
from megatron_mergemix.merge.methods import Recipe
from tests.support.checkpoint_family import random_model, write_save

PATIENCE = 60
"""Seconds after which what has not happened never will."""


def merge(root: Path, threads: int) -> None:
    """Merge a base and two experts of one chunking, a few elements at a time."""
    paths = {}
    for seed, name in enumerate(("base", "a", "b")):
        paths[name] = write_save(root / name / "iter_0000003", random_model(seed), chunking=1)
    experts = {"a": (paths["a"], 0.5), "b": (paths["b"], 0.9)}
    recipe = Recipe("task_arithmetic", ())
    settings = Settings(threads=threads)
    merge_checkpoints(paths["base"], experts, recipe, root / "out", settings, {})


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "SLICE", 7)


def test_every_checkpoint_is_read_in_the_order_of_its_files(tmp_path, monkeypatch) -> None:
    places = defaultdict(list)
    read = os.preadv

    def recorded(descriptor: int, buffers: list[memoryview], position: int) -> int:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        places[path.parent.parent.name].append((path.name, position))
        return read(descriptor, buffers, position)

    monkeypatch.setattr(os, "preadv", recorded)
    merge(tmp_path, threads=1)
    assert {name: len({file for file, _ in places[name]}) for name in ("a", "b")} == {
        "a": 3,
        "b": 3,
    }
    for name in ("a", "b"):
        assert len(places[name]) > 30
        assert places[name] == sorted(set(places[name])), f"{name}: back and forth, or twice"


@pytest.mark.parametrize("slow", ["pwrite", "preadv"])
def test_reading_goes_on_while_writing_waits_and_the_other_way_round(
    tmp_path, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    other = {"pwrite": "preadv", "preadv": "pwrite"}[slow]
    calls = {name: getattr(os, name) for name in (slow, other)}
    waiting, went_on, waited = threading.Lock(), threading.Event(), []

    def slow_call(*args: object) -> int:
        by_a_thread = threading.current_thread() is not threading.main_thread()
        if by_a_thread and waiting.acquire(blocking=False):
            went_on.clear()
            waited.append(went_on.wait(PATIENCE))
        return calls[slow](*args)

    def other_call(*args: object) -> int:
        count = calls[other](*args)
        went_on.set()
        return count

    monkeypatch.setattr(os, slow, slow_call)
    monkeypatch.setattr(os, other, other_call)
    merge(tmp_path, threads=2)
    assert waited == [True], f"no {other} before the first {slow} had ended"


def test_there_are_threads_enough_to_overlap_by_default() -> None:
    assert Settings().threads >= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_largest_numbers_are_finite_and_nothing_beyond_is(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    numbers = torch.tensor([largest, -largest] * 5 + [0.0, -0.0, 1.0], dtype=dtype)
    assert engine._is_finite(numbers)
    for bad in (math.inf, -math.inf, math.nan, -math.nan):
        for place in range(len(numbers)):
            changed = numbers.clone()
            changed[place] = bad
            assert not engine._is_finite(changed), (bad, place)
    negative_nan = -torch.tensor([math.nan], dtype=dtype)
    assert not engine._is_finite(torch.cat([numbers, negative_nan]))
