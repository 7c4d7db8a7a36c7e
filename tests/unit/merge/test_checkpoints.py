"""Whole merges on disk: what comes out, what is refused, and what a killed merge leaves."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_mergemix.checkpoint import integrity
from megatron_mergemix.checkpoint.common_state import arguments, read_common
from megatron_mergemix.checkpoint.metadata import read_index
from megatron_mergemix.checkpoint.reader import CheckpointReader
from megatron_mergemix.errors import CheckpointError
from megatron_mergemix.merge import engine
from megatron_mergemix.merge.checkpoints import Settings, Summary, merge_checkpoints
from megatron_mergemix.merge.linear import BLOCK, weighted_sum_
from megatron_mergemix.merge.methods import Recipe
from tests.support.checkpoint_family import (
    EXTRA_STATE,
    OTHER_EXTRA_STATE,
    random_model,
    saved_object,
    write_family,
    write_save,
)

VOCABULARY = "embedding.word_embeddings.weight"
RECIPES = {
    "linear": Recipe("linear", ()),
    "task_arithmetic": Recipe("task_arithmetic", (), 0.7),
    "ties": Recipe("ties", (), 0.9, 0.4),
    "dare": Recipe("dare", (), 0.9, 0.5, 3),
    "slerp": Recipe("slerp", ()),
}


def merge(
    folders: dict[str, Path],
    weights: dict[str, float],
    target: Path,
    recipe: Recipe = RECIPES["linear"],
    **settings: object,
) -> Summary:
    experts = {name: (folders[name], weight) for name, weight in weights.items()}
    chosen = replace(Settings(threads=2), **settings)
    return merge_checkpoints(folders["base"], experts, recipe, target, chosen, {})


def tensors(folder: Path) -> dict[str, Tensor]:
    """Return every tensor as torch's own reader gives it."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(state, storage_reader=reader, no_dist=True)
    return state


def data_of(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(root.glob("release/*.distcp"))}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], tensor) and first[name].dtype == tensor.dtype
        for name, tensor in second.items()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["a", "b"])
def test_one_hot_weights_are_that_expert_bit_for_bit(tmp_path, name, dtype) -> None:
    folders, models = write_family(tmp_path, dtype)
    weights = {"a": float(name == "a"), "b": float(name == "b")}
    assert same(tensors(merge(folders, weights, tmp_path / "out").folder), models[name])


def test_a_merge_on_disk_is_the_merge_in_memory_bit_for_bit(tmp_path) -> None:
    folders, models = write_family(tmp_path)
    recipe = RECIPES["task_arithmetic"]
    merged = tensors(merge(folders, {"a": 0.5, "b": 0.9}, tmp_path / "out", recipe).folder)
    for name, tensor in merged.items():
        expected = torch.empty_like(tensor).view(-1)
        parts = [models[which][name].reshape(-1) for which in ("base", "a", "b")]
        weights = [1 - (0.7 * 0.5 + 0.7 * 0.9), 0.7 * 0.5, 0.7 * 0.9]
        weighted_sum_(expected, parts, weights, torch.empty(BLOCK))
        assert torch.equal(tensor.view(-1), expected)


@pytest.mark.parametrize("method", RECIPES)
def test_slices_threads_chunks_and_layouts_do_not_change_a_bit(
    tmp_path, monkeypatch: pytest.MonkeyPatch, method
) -> None:
    folders, models = write_family(tmp_path)
    weights = {"a": 0.3, "b": 0.7}
    expected = tensors(merge(folders, weights, tmp_path / "out", RECIPES[method]).folder)
    for number, (size, chunking) in enumerate([(1, 0), (7, 1), (13, 2)]):
        monkeypatch.setattr(engine, "SLICE", size)
        for shift, name in enumerate(("base", "a", "b")):
            folder = tmp_path / f"{name}{number}" / "iter_0000003"
            folders[name] = write_save(folder, models[name], (chunking + shift) % 3)
        target = tmp_path / f"out{number}"
        found = merge(folders, weights, target, RECIPES[method], threads=3)
        assert same(tensors(found.folder), expected)


def test_one_two_and_three_workers_write_the_same_bytes(tmp_path) -> None:
    folders, _ = write_family(tmp_path)
    written = []
    for workers in (1, 2, 3):
        for method in ("linear", "ties"):
            target = tmp_path / f"{method}{workers}"
            merge(folders, {"a": 0.3, "b": 0.7}, target, RECIPES[method], workers=workers)
            written.append(data_of(target))
    assert written[0] == written[2] == written[4]
    assert written[1] == written[3] == written[5]


def test_files_chunks_and_extra_state_are_the_bases(tmp_path) -> None:
    folders, _ = write_family(tmp_path)
    base = read_index(folders["base"])
    folder = merge(folders, {"a": 0.3, "b": 0.7}, tmp_path / "out").folder
    merged = read_index(folder)
    assert merged.tensors.keys() == base.model_tensors().keys()
    for name, tensor in merged.tensors.items():
        theirs = [(c.offsets, c.sizes, c.file) for c in base.tensors[name].chunks]
        assert [(c.offsets, c.sizes, c.file) for c in tensor.chunks] == theirs
    assert merged.bytes_entries.keys() == {EXTRA_STATE, OTHER_EXTRA_STATE}
    assert CheckpointReader(merged).read_bytes(EXTRA_STATE) == saved_object([b"extra"])
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "release"


@pytest.mark.parametrize("layout", ["common.pt", "common_state"])
def test_the_common_state_holds_arguments_and_provenance_but_no_training(tmp_path, layout) -> None:
    folders, _ = write_family(tmp_path)
    folder = merge(folders, {"a": 0.3, "b": 0.7}, tmp_path / "out", layout=layout).folder
    common = read_common(read_index(folder))
    wanted = {"args", "checkpoint_version", "content_metadata", "iteration", "mergemix"}
    assert common.keys() == wanted
    assert arguments(common) == {"seq_length": 8, "consumed_train_samples": 0, "iteration": 0}
    provenance = json.loads((tmp_path / "out" / "mergemix.json").read_text())
    assert common["mergemix"] == provenance
    assert provenance["experts"]["b"]["weight"] == 0.7
    assert (folder / "common.pt").exists() == (layout == "common.pt")
    if layout == "common.pt":
        import argparse

        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(folder / "common.pt", weights_only=True)
        assert loaded["args"].seq_length == 8


def test_an_expert_of_weight_zero_is_not_opened(tmp_path) -> None:
    folders, models = write_family(tmp_path)
    folders["a"] = tmp_path / "nowhere"
    folder = merge(folders, {"a": 0.0, "b": 1.0}, tmp_path / "out").folder
    assert same(tensors(folder), models["b"])


def test_fp32_master_weights_are_read_on_request(tmp_path) -> None:
    masters = {name: random_model(seed, torch.float32) for seed, name in enumerate(("base", "a"))}
    folders = {
        name: write_save(
            tmp_path / name / "iter_0000003",
            {key: tensor.bfloat16() for key, tensor in master.items()},
            masters=master,
        )
        for name, master in masters.items()
    }
    recipe = Recipe("task_arithmetic", (), 1.0)
    folder = merge(folders, {"a": 0.25}, tmp_path / "out", recipe, from_master_weights=True).folder
    for name, tensor in tensors(folder).items():
        exact = 0.75 * masters["base"][name] + 0.25 * masters["a"][name]
        assert torch.equal(tensor, exact.bfloat16())


def test_master_weights_that_are_not_there_are_an_error(tmp_path) -> None:
    folders, _ = write_family(tmp_path)
    with pytest.raises(CheckpointError, match="no fp32 master weight"):
        merge(folders, {"a": 0.5, "b": 0.5}, tmp_path / "out", from_master_weights=True)


def test_padding_rows_beyond_the_vocabulary_are_the_bases(tmp_path) -> None:
    folders, models = write_family(tmp_path)
    wide = dict(models["b"])
    wide[VOCABULARY] = torch.cat([wide[VOCABULARY], torch.full((4, 6), 9.0).bfloat16()])
    folders["b"] = write_save(tmp_path / "wide" / "iter_0000003", wide, 2)
    with pytest.raises(CheckpointError, match="pads its vocabulary"):
        merge(folders, {"a": 0.0, "b": 1.0}, tmp_path / "out")
    with pytest.raises(CheckpointError, match="other shapes"):
        merge(folders, {"a": 0.0, "b": 1.0}, tmp_path / "out", vocab_size=17)
    folder = merge(folders, {"a": 0.0, "b": 1.0}, tmp_path / "out", vocab_size=11).folder
    merged = tensors(folder)[VOCABULARY]
    assert torch.equal(merged[:11], models["b"][VOCABULARY][:11])
    assert torch.equal(merged[11:], models["base"][VOCABULARY][11:])


def with_bad_elements(tmp_path: Path) -> dict[str, Path]:
    folders, models = write_family(tmp_path)
    bad = {name: tensor.clone() for name, tensor in models["b"].items()}
    bad["decoder.layers.mlp.router.weight"][1, 2, :2] = float("nan")
    bad["decoder.final_layernorm.weight"][5] = float("inf")
    folders["b"] = write_save(tmp_path / "bad" / "iter_0000003", bad, 1)
    return folders


def test_nan_and_infinity_are_named_and_nothing_is_published(tmp_path) -> None:
    folders = with_bad_elements(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        merge(folders, {"a": 0.5, "b": 0.5}, tmp_path / "out")
    text = str(caught.value)
    assert "bad/iter_0000003/__" in text
    assert "decoder.layers.mlp.router.weight: 2" in text
    assert "decoder.final_layernorm.weight: 1" in text
    assert "iter_0000003/__" not in text.replace("bad/iter_0000003/__", "")
    assert not list(tmp_path.glob("*out*"))


def test_nan_is_published_on_request_and_still_named(tmp_path) -> None:
    folders = with_bad_elements(tmp_path)
    summary = merge(folders, {"a": 0.5, "b": 0.5}, tmp_path / "out", allow_non_finite=True)
    assert sum(summary.non_finite.values()) == 3
    found = tensors(summary.folder)
    assert sum(int((~tensor.isfinite()).sum()) for tensor in found.values()) == 3


def test_an_overflow_in_the_result_is_named(tmp_path) -> None:
    folders, models = write_family(tmp_path, torch.float16)
    big = {name: torch.full_like(tensor, 6e4) for name, tensor in models["a"].items()}
    folders["a"] = write_save(tmp_path / "big" / "iter_0000003", big)
    recipe = Recipe("task_arithmetic", (), 1.0)
    with pytest.raises(CheckpointError, match="overflow"):
        merge(folders, {"a": 2.0}, tmp_path / "out", recipe)


def test_an_existing_folder_is_refused_and_only_our_own_overwritten(tmp_path) -> None:
    folders, models = write_family(tmp_path)
    target = tmp_path / "out"
    target.mkdir()
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="exists already|did not write it"):
            merge(folders, {"a": 1.0}, target, overwrite=overwrite)
    target.rmdir()
    merge(folders, {"a": 1.0}, target)
    with pytest.raises(CheckpointError, match="pass --overwrite"):
        merge(folders, {"b": 1.0}, target)
    merge(folders, {"b": 1.0}, target, overwrite=True)
    assert same(tensors(target / "release"), models["b"])
    assert not list(tmp_path.glob(".out*"))


def test_integrity_is_written_verified_and_believed_over_crc(tmp_path) -> None:
    folders, models = write_family(tmp_path)
    merge(folders, {"a": 1.0}, tmp_path / "one", write_integrity=True)
    folders["a"] = tmp_path / "one"
    assert integrity.verify(tmp_path / "one" / "release", 1)
    assert same(tensors(merge(folders, {"a": 1.0}, tmp_path / "two").folder), models["a"])
    path = tmp_path / "one" / "release" / "common.pt"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(CheckpointError, match="common.pt has changed"):
        merge(folders, {"a": 1.0}, tmp_path / "three")


# ---- interruptions ----

CALLS = ("pwrite", "fsync", "rename", "mkdir")


def interrupted(at: int, act: Callable[[], None]) -> list[int]:
    """Let the ``at``-th call that changes the disk do something else first; count them all."""
    count = [0]

    def wrap(name: str) -> None:
        original = getattr(os, name)

        def call(*args: object, **kwargs: object) -> object:
            count[0] += 1
            if count[0] == at:
                act()
            return original(*args, **kwargs)

        setattr(os, name, call)

    for name in CALLS:
        wrap(name)
    return count


def killed_at(folders: dict[str, Path], target: Path, at: int) -> None:
    interrupted(at, lambda: os.kill(os.getpid(), signal.SIGKILL))
    merge(folders, {"a": 0.5, "b": 0.5}, target, threads=1, overwrite=True)


def test_a_kill_at_any_point_leaves_nothing_or_the_whole(tmp_path) -> None:
    folders, _ = write_family(tmp_path)
    context = multiprocessing.get_context("fork")
    whole: dict[str, bytes] | None = None
    merge(folders, {"a": 0.5, "b": 0.5}, tmp_path / "expected", threads=1)
    expected = data_of(tmp_path / "expected")
    target = tmp_path / "out"
    for at in range(1, 400):
        child = context.Process(target=killed_at, args=(folders, target, at))
        child.start()
        child.join()
        if target.exists():
            whole = data_of(target)
            assert whole == expected
            assert same(tensors(target / "release"), tensors(tmp_path / "expected" / "release"))
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        assert len(list(tmp_path.glob(".out.building.*"))) <= 1, "leftovers pile up"
    assert child.exitcode == 0
    assert not list(tmp_path.glob(".out.*"))
    assert at > 30
    assert whole == expected
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("name", ["pwrite", "fsync", "rename", "preadv"])
def test_a_failing_disk_is_reported_and_leaves_nothing(tmp_path, monkeypatch, name) -> None:
    folders, _ = write_family(tmp_path)
    original = getattr(os, name)
    reading = name == "preadv"
    for at in (1, 2, 5):
        left = [at]

        def failing(*args, left=left, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.EIO if reading else errno.ENOSPC, "disk says no")
            return original(*args, **kwargs)

        monkeypatch.setattr(os, name, failing)
        if name == "rename" and at > 1:
            continue
        with pytest.raises(CheckpointError, match="disk says no"):
            merge(folders, {"a": 0.5, "b": 0.5}, tmp_path / "out")
        assert not list(tmp_path.glob("*out*"))
    monkeypatch.setattr(os, name, original)
    merge(folders, {"a": 0.5, "b": 0.5}, tmp_path / "out")


def test_a_disk_without_room_is_refused_beforehand(tmp_path, monkeypatch) -> None:
    folders, _ = write_family(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(CheckpointError, match="GB are needed"):
        merge(folders, {"a": 1.0}, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
