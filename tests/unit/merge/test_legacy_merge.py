"""Merges of legacy checkpoints on disk: what comes out, and what is refused."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import random
import shutil
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mergemix.checkpoint import pickle_writer
from megatron_mergemix.errors import CheckpointError
from megatron_mergemix.merge import engine
from megatron_mergemix.merge.checkpoints import Settings, merge_checkpoints
from megatron_mergemix.merge.methods import Recipe
from tests.support.checkpoint_family import saved_object, write_family
from tests.support.legacy_family import (
    EMBEDDING,
    EXTRA_STATE,
    FILE,
    NORM,
    RANKS,
    is_weight,
    random_models,
    read_legacy_files,
    write_legacy,
    write_legacy_family,
)

ROUNDS = 120


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (self.folder,))


ARITHMETIC = Recipe("task_arithmetic", (), 0.7)


def merge(
    folders: dict[str, Path],
    weights: dict[str, float],
    target: Path,
    recipe: Recipe = ARITHMETIC,
    **more: object,
) -> Path:
    experts = {name: (folders[name], weight) for name, weight in weights.items()}
    chosen = replace(Settings(threads=2), **more)
    return merge_checkpoints(folders["base"], experts, recipe, target, chosen, {}).folder


def weights_of(folder: Path) -> dict[tuple[str, str, str], torch.Tensor]:
    return {
        (rank, key, name): value
        for rank, state in read_legacy_files(folder).items()
        for key, model in state.items()
        if key.startswith("model")
        for name, value in model.items()
        if is_weight(value)
    }


def data_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob("*/*.pt"))}


@pytest.mark.parametrize("buffer", [False, True], ids=["storages", "buffer"])
@pytest.mark.parametrize("layout", RANKS)
def test_one_hot_weights_are_that_expert_bit_for_bit(tmp_path, layout, buffer) -> None:
    folders, _ = write_legacy_family(tmp_path, layout, buffer=buffer)
    out = merge(folders, {"a": 0.0, "b": 1.0}, tmp_path / "out", Recipe("linear", ()))
    merged, expert = weights_of(out), weights_of(folders["b"])
    assert list(merged) == list(expert)
    assert all(torch.equal(merged[name], expert[name]) for name in expert)


@settings(max_examples=12, deadline=None)
@given(
    layout=st.sampled_from(sorted(RANKS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    first=st.floats(-1, 2),
    second=st.floats(-1, 2),
    size=st.sampled_from([1, 7, 1 << 20]),
    buffer=st.booleans(),
)
def test_a_merge_is_the_sum_in_double_precision(
    tmp_path_factory: pytest.TempPathFactory, layout, dtype, first, second, size, buffer
) -> None:
    root = tmp_path_factory.mktemp("legacy")
    folders, _ = write_legacy_family(root, layout, dtype, buffer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "SLICE", size)
        out = merge(folders, {"a": first, "b": second}, root / "out")
    base, a, b = (weights_of(folders[name]) for name in ("base", "a", "b"))
    for name, tensor in weights_of(out).items():
        origin = base[name].double()
        exact = origin + 0.7 * (
            first * (a[name].double() - origin) + second * (b[name].double() - origin)
        )
        largest = max(t[name].double().abs().max().item() for t in (base, a, b))
        bound = 2 * torch.finfo(dtype).eps * exact.abs() + 1e-6 * (1 + 8 * largest)
        assert tensor.dtype == dtype
        assert bool(((tensor.double() - exact).abs() <= bound).all())


def test_the_rest_of_the_file_is_as_megatron_finetunes_from_it(tmp_path) -> None:
    folders, _ = write_legacy_family(tmp_path, "pipeline")
    out = merge(folders, {"a": 0.5, "b": 0.5}, tmp_path / "out")
    assert out == tmp_path / "out" / "release"
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "release"
    told = json.loads((tmp_path / "out" / "mergemix.json").read_text())
    assert told["experts"]["b"]["path"] == str(folders["b"])
    for rank, state in read_legacy_files(out).items():
        assert set(state) == {"args", "checkpoint_version", "iteration", "mergemix", "model"}
        assert (state["checkpoint_version"], state["iteration"]) == (3.0, 0)
        assert state["mergemix"] == told
        assert state["args"].pipeline_model_parallel_size == 2
        assert (state["args"].iteration, state["args"].consumed_train_samples) == (0, 0)
        assert state["args"].params_dtype == torch.bfloat16
        base = read_legacy_files(folders["base"])[rank]["model"]
        assert type(state["model"]) is OrderedDict
        assert list(state["model"]) == list(base)
        assert state["model"]._metadata == base._metadata
        assert state["model"][EXTRA_STATE].getvalue() == base[EXTRA_STATE].getvalue()
        assert state["model"]["decoder.layers.0.router.tokens"].tolist() == [0, 7]


def test_extra_states_are_the_bases(tmp_path) -> None:
    models = {name: random_models("tensor", seed) for name, seed in (("base", 0), ("a", 1))}
    folders = {}
    for name, ranks in models.items():
        for model in ranks.values():
            content = pickle.dumps({"scale": torch.ones(2), "of": name})
            model["model"][EXTRA_STATE] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        folders[name] = write_legacy(tmp_path / name / "iter_0000003", "tensor", ranks)
    out = merge(folders, {"a": 1.0}, tmp_path / "out", Recipe("linear", ()))
    for rank, state in read_legacy_files(out).items():
        expected = models["base"][rank]["model"][EXTRA_STATE]
        assert torch.equal(state["model"][EXTRA_STATE], expected)


@pytest.mark.parametrize("layout", ["pipeline", "both", "virtual"])
def test_tied_embeddings_stay_tied_over_stages(tmp_path, layout) -> None:
    folders, _ = write_legacy_family(tmp_path, layout)
    merged = weights_of(merge(folders, {"a": 0.3, "b": 0.9}, tmp_path / "out"))
    first = {rank[:10]: t for (rank, _, name), t in merged.items() if name == EMBEDDING}
    last = {rank[:10]: t for (rank, _, name), t in merged.items() if name == "output_layer.weight"}
    assert first.keys() == last.keys()
    assert all(torch.equal(first[rank], last[rank]) for rank in first)


def test_copies_over_ranks_stay_copies(tmp_path) -> None:
    folders, _ = write_legacy_family(tmp_path, "tensor")
    merged = weights_of(merge(folders, {"a": 0.3, "b": 0.9}, tmp_path / "out"))
    first, second = (t for (_, _, name), t in merged.items() if name == NORM)
    assert torch.equal(first, second)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare", "slerp"])
def test_one_rank_takes_every_method(tmp_path, method) -> None:
    folders, _ = write_legacy_family(tmp_path, "one", torch.float32)
    recipe = Recipe(method, (), 1.0, 0.5 if method in ("ties", "dare") else 1.0, 3)
    merged = weights_of(merge(folders, {"a": 0.4, "b": 0.6}, tmp_path / "out", recipe))
    assert all(bool(tensor.isfinite().all()) for tensor in merged.values())
    base = weights_of(folders["base"])
    assert not any(torch.equal(merged[name], base[name]) for name in base)


@pytest.mark.parametrize("method", ["ties", "dare", "slerp"])
def test_methods_that_see_whole_tensors_are_refused_over_ranks(tmp_path, method) -> None:
    folders, _ = write_legacy_family(tmp_path, "tensor")
    with pytest.raises(CheckpointError, match=f"2 ranks hold parts .*{method}.*--ckpt-convert-for"):
        merge(folders, {"a": 0.5, "b": 0.5}, tmp_path / "out", Recipe(method, (), 1.0, 0.5))
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    "more", [{"from_master_weights": True}, {"write_integrity": True}, {"layout": "common_state"}]
)
def test_what_only_torch_dist_has_is_refused(tmp_path, more) -> None:
    folders, _ = write_legacy_family(tmp_path, "one")
    with pytest.raises(CheckpointError, match="is for torch_dist only"):
        merge(folders, {"a": 0.5, "b": 0.5}, tmp_path / "out", **more)


def test_workers_threads_and_slices_write_the_same_bytes(tmp_path, monkeypatch) -> None:
    folders, _ = write_legacy_family(tmp_path, "both")
    expected = data_of(merge(folders, {"a": 0.3, "b": 0.7}, tmp_path / "1"))
    for workers in (2, 3):
        out = tmp_path / str(workers)
        merge(folders, {"a": 0.3, "b": 0.7}, out, workers=workers)
        told = [json.loads((root / "mergemix.json").read_text()) for root in (tmp_path / "1", out)]
        assert told[0] == told[1]
        assert data_of(out / "release") == expected
    monkeypatch.setattr(engine, "SLICE", 5)
    assert data_of(merge(folders, {"a": 0.3, "b": 0.7}, tmp_path / "s", threads=3)) == expected


def test_experts_of_weight_zero_are_not_opened(tmp_path) -> None:
    folders, _ = write_legacy_family(tmp_path, "tensor")
    folders["b"] = tmp_path / "missing"
    merged = weights_of(
        merge(folders, {"a": 1.0, "b": 0.0}, tmp_path / "out", Recipe("linear", ()))
    )
    assert all(torch.equal(merged[name], t) for name, t in weights_of(folders["a"]).items())


def test_another_layout_is_refused_with_the_flags_that_convert_it(tmp_path) -> None:
    folders, _ = write_legacy_family(tmp_path / "tensor", "tensor")
    folders["b"] = write_legacy_family(tmp_path / "one", "one")[0]["b"]
    with pytest.raises(CheckpointError) as caught:
        merge(folders, {"a": 0.5, "b": 0.5}, tmp_path / "out")
    message = str(caught.value)
    assert "Expert 'b'" in message
    assert "under tensor 1, pipeline 1, expert 1, the base under tensor 2" in message
    assert "--ckpt-convert-format torch_dist" in message


def test_pipeline_and_expert_ranks_of_one_name_are_told_apart(tmp_path) -> None:
    folders, _ = write_legacy_family(tmp_path / "expert", "expert")
    folders["b"] = write_legacy_family(tmp_path / "pipeline", "pipeline")[0]["b"]
    with pytest.raises(CheckpointError, match="under tensor 1, pipeline 2, expert 1, the base"):
        merge(folders, {"a": 0.5, "b": 0.5}, tmp_path / "out")


@pytest.mark.parametrize("legacy", ["base", "b"])
def test_a_mix_of_formats_is_refused(tmp_path, legacy) -> None:
    folders, _ = write_family(tmp_path / "dist")
    folders[legacy] = write_legacy_family(tmp_path / "legacy", "one")[0][legacy]
    with pytest.raises(CheckpointError, match=r"legacy torch.*--ckpt-convert-format"):
        merge(folders, {"b": 1.0}, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("lost", ["mp_rank_00_000", "mp_rank_01_001"])
def test_a_missing_rank_is_named(tmp_path, lost) -> None:
    folders, _ = write_legacy_family(tmp_path, "both")
    shutil.rmtree(folders["a"] / lost)
    with pytest.raises(CheckpointError, match=f"lacks {lost}"):
        merge(folders, {"a": 1.0}, tmp_path / "out")


def test_a_missing_file_of_a_rank_is_named(tmp_path) -> None:
    folders, _ = write_legacy_family(tmp_path, "tensor")
    (folders["a"] / "mp_rank_01" / FILE).unlink()
    with pytest.raises(CheckpointError, match=r"a/iter_0000003/mp_rank_01/model_optim_rng.pt can"):
        merge(folders, {"a": 1.0}, tmp_path / "out")


def test_ranks_of_different_saves_are_refused(tmp_path) -> None:
    folders, models = write_legacy_family(tmp_path, "tensor")
    other = write_legacy(tmp_path / "other", "tensor", models["a"], iteration=4)
    shutil.copy(other / "mp_rank_01" / FILE, folders["a"] / "mp_rank_01" / FILE)
    with pytest.raises(CheckpointError, match="different iterations: 3, 4"):
        merge(folders, {"a": 1.0}, tmp_path / "out")


def test_other_shapes_and_names_are_refused(tmp_path) -> None:
    folders, models = write_legacy_family(tmp_path, "tensor")
    models["a"]["mp_rank_01"]["model"][NORM] = torch.ones(7)
    models["b"]["mp_rank_00"]["model"]["more.weight"] = torch.ones(2)
    for name in ("a", "b"):
        write_legacy(folders[name], "tensor", models[name])
    with pytest.raises(CheckpointError) as caught:
        merge(folders, {"a": 0.5, "b": 0.5}, tmp_path / "out")
    assert f"mp_rank_01/model/{NORM} is (7,) in it, (6,) in the base" in str(caught.value)
    assert "tensors that the base lacks: mp_rank_00/model/more.weight" in str(caught.value)


def test_nan_and_infinity_are_named_with_file_tensor_and_count(tmp_path) -> None:
    folders, models = write_legacy_family(tmp_path, "tensor")
    models["b"]["mp_rank_01"]["model"][NORM][1:3] = torch.nan
    models["b"]["mp_rank_01"]["model"][NORM][4] = torch.inf
    write_legacy(folders["b"], "tensor", models["b"])
    where = rf"b/iter_0000003/mp_rank_01/model_optim_rng.pt: mp_rank_01/model/{NORM}: 3\n"
    with pytest.raises(CheckpointError, match=where):
        merge(folders, {"a": 0.5, "b": 0.5}, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
    out = merge(folders, {"a": 0.5, "b": 0.5}, tmp_path / "out", allow_non_finite=True)
    assert weights_of(out)["mp_rank_01", "model", NORM].isnan().sum() == 2


@pytest.mark.parametrize("where", ["a weight", "a gap between weights", "an extra state"])
def test_a_flipped_bit_is_never_merged(tmp_path, where) -> None:
    folders, models = write_legacy_family(tmp_path, "tensor", buffer=True)
    which, rank = ("base" if where == "an extra state" else "b"), "mp_rank_01"
    content = pickle.dumps({"scale": 1.0, "name": "needle"})
    state = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    models[which][rank]["model"][EXTRA_STATE] = state
    write_legacy(folders[which], "tensor", models[which], buffer=True)
    path = folders[which] / rank / FILE
    data = bytearray(path.read_bytes())
    needle = models[which][rank]["model"][NORM].view(torch.uint8).numpy().tobytes()
    at = {
        "a weight": data.index(needle) + 2,
        "a gap between weights": data.index(needle) + len(needle) + 4,
        "an extra state": data.index(b"needle"),
    }[where]
    data[at] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="mp_rank_01/model_optim_rng.pt.* have changed"):
        merge(folders, {"b": 1.0}, tmp_path / "out", Recipe("linear", ()))
    assert not list(tmp_path.glob("*out*"))


def test_damage_anywhere_is_an_error_or_changes_nothing(tmp_path) -> None:
    folders, _ = write_legacy_family(tmp_path / "sound", "tensor")
    expected = data_of(merge(folders, {"a": 0.5, "b": 0.5}, tmp_path / "expected"))
    refused = 0
    for seed in range(ROUNDS):
        rng = random.Random(seed)
        which = rng.choice(sorted(folders))
        copy = tmp_path / "copy" / "iter_0000003"
        shutil.copytree(folders[which], copy)
        path = rng.choice(sorted(copy.glob("*/*.pt")))
        data = bytearray(path.read_bytes())
        at, kind = rng.randrange(len(data)), rng.choice(["truncate", "flip", "noise", "grow"])
        if kind == "truncate":
            del data[at:]
        elif kind == "flip":
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "noise":
            data[at : at + 16] = rng.randbytes(len(data[at : at + 16]))
        else:
            data[at:at] = rng.randbytes(7)
        path.write_bytes(data)
        try:
            merge({**folders, which: copy}, {"a": 0.5, "b": 0.5}, tmp_path / "out")
        except CheckpointError:
            refused += 1
            assert not list(tmp_path.glob("*out*"))
        else:
            found = weights_of(tmp_path / "out" / "release")
            sound = weights_of(tmp_path / "expected" / "release")
            assert all(torch.equal(found[name], sound[name]) for name in sound), f"{seed} {kind}"
        shutil.rmtree(tmp_path / "copy")
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert ROUNDS / 4 < refused < ROUNDS
    assert expected


@pytest.mark.parametrize(
    "place",
    ["file", "entry", "args", "model", "weight", "buffered state", "state of bytes", "optimizer"],
)
@pytest.mark.parametrize("which", ["base", "a"])
def test_a_planted_pickle_is_never_executed_nor_passed_on(tmp_path, place, which) -> None:
    folders, models = write_legacy_family(tmp_path, "tensor")
    payload = Payload(tmp_path / "executed")
    path = folders[which] / "mp_rank_01" / FILE
    model = models[which]["mp_rank_01"]["model"]
    more = {}
    if place == "weight":
        model[NORM] = payload
    elif place == "buffered state":
        model[EXTRA_STATE] = io.BytesIO(saved_object(payload))
    elif place == "state of bytes":
        content = bytearray(pickle.dumps(payload))
        model[EXTRA_STATE] = torch.frombuffer(content, dtype=torch.uint8)
    elif place in ("optimizer", "args", "model", "entry"):
        more = {place: payload}
    write_legacy(folders[which], "tensor", models[which], **more)
    if place == "file":
        path.write_bytes(pickle.dumps(payload))
    is_dropped = place in ("optimizer", "entry")  # and so is all but the weights of an expert
    if not is_dropped and (which == "base" or place in ("file", "model", "weight")):
        with pytest.raises(CheckpointError, match="posix.mkdir|not a whole archive"):
            merge(folders, {"a": 1.0}, tmp_path / "out", Recipe("linear", ()))
        assert not list(tmp_path.glob("*out*"))
    else:
        merge(folders, {"a": 1.0}, tmp_path / "out", Recipe("linear", ()))
        for data in data_of(tmp_path / "out" / "release").values():
            assert b"mkdir" not in data
            assert b"executed" not in data
    assert not (tmp_path / "executed").exists()


def test_quantised_parameters_are_refused(tmp_path) -> None:
    folders, models = write_legacy_family(tmp_path, "one")
    for name in folders:
        model = models[name]["mp_rank_00"]["model"]
        model[NORM] = model[NORM].to(torch.float8_e4m3fn)
        write_legacy(folders[name], "one", models[name])
    with pytest.raises(CheckpointError, match="float8_e4m3fn: quantised"):
        merge(folders, {"a": 1.0}, tmp_path / "out")


def test_parameters_of_an_unknown_class_are_refused(tmp_path) -> None:
    folders, models = write_legacy_family(tmp_path, "one")
    models["a"]["mp_rank_00"]["model"][NORM] = np.ones(6)
    write_legacy(folders["a"], "one", models["a"])
    with pytest.raises(CheckpointError, match=f"{NORM} is a numpy.* and not a plain tensor"):
        merge(folders, {"a": 1.0}, tmp_path / "out")


def test_entries_with_tensors_that_nobody_knows_are_refused(tmp_path) -> None:
    folders, models = write_legacy_family(tmp_path, "one")
    write_legacy(folders["a"], "one", models["a"], critic={"weight": torch.ones(3)})
    with pytest.raises(CheckpointError, match="'critic' holds tensors"):
        merge(folders, {"a": 1.0}, tmp_path / "out")


def test_a_pickle_that_refers_to_itself_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(pickle_writer, "MAX_BYTES", 1 << 20)
    folders, models = write_legacy_family(tmp_path, "one")
    circle: list[object] = []
    circle.append(circle)
    write_legacy(folders["base"], "one", models["base"], checkpoint_version=circle)
    with pytest.raises(CheckpointError, match="too deeply nested"):
        merge(folders, {"a": 1.0}, tmp_path / "out")
    bomb: list[object] = [1]
    for _ in range(60):
        bomb = [bomb, bomb]
    write_legacy(folders["base"], "one", models["base"], checkpoint_version=bomb)
    with pytest.raises(CheckpointError, match="too long"):
        merge(folders, {"a": 1.0}, tmp_path / "out")


def test_models_that_hold_themselves_or_too_much_are_refused(tmp_path) -> None:
    folders, models = write_legacy_family(tmp_path, "one")
    circle: dict[object, object] = {7: 1}
    circle["again"] = circle
    write_legacy(folders["base"], "one", models["base"], model1=circle)
    write_legacy(folders["a"], "one", models["a"], model1={})
    with pytest.raises(CheckpointError, match="too deeply nested"):
        merge(folders, {"a": 1.0}, tmp_path / "out")
    deep: dict[str, object] = {}
    for _ in range(200):
        deep = {"x": deep}
    for place in ("model1", "optimizer"):
        write_legacy(folders["base"], "one", models["base"], **{place: deep})
        with pytest.raises(CheckpointError, match="nested more than 64 deep"):
            merge(folders, {"a": 1.0}, tmp_path / "out")


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch) -> None:
    folders, _ = write_legacy_family(tmp_path, "tensor")
    pwrite, calls = os.pwrite, []

    def full(*arguments: object) -> int:
        calls.append(arguments)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CheckpointError, match="No space left"):
        merge(folders, {"a": 1.0}, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
