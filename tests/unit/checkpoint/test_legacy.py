"""Legacy checkpoints: which files belong to one, what they contain, what is counted once."""

from __future__ import annotations

import argparse
import re
import zipfile
from pathlib import Path

import pytest
import torch

from megatron_mergemix.checkpoint.legacy import FILE, LegacyIndex, read_legacy
from megatron_mergemix.checkpoint.opening import all_saves, common_of, open_checkpoint
from megatron_mergemix.checkpoint.reader import CheckpointReader
from megatron_mergemix.checkpoint.saves import resolve
from megatron_mergemix.errors import CheckpointError
from megatron_mergemix.merge.copies import copies
from tests.support.legacy_family import (
    EMBEDDING,
    NORM,
    RANKS,
    random_models,
    write_legacy,
    write_legacy_family,
)


@pytest.mark.parametrize("buffer", [False, True], ids=["storages", "buffer"])
@pytest.mark.parametrize("layout", RANKS)
def test_every_tensor_of_every_rank_is_read_as_it_was_saved(tmp_path, layout, buffer) -> None:
    models = random_models(layout, 4, torch.float32)
    index = open_checkpoint(write_legacy(tmp_path / "iter_0000003", layout, models, buffer=buffer))
    assert isinstance(index, LegacyIndex)
    assert index.iteration == 3
    assert index.ranks == tuple(RANKS[layout][1])
    assert {axis: size for axis, size in index.sizes.items() if size > 1} == RANKS[layout][0]
    expected = {
        f"{rank}/{key}/{name}": tensor
        for rank, keys in models.items()
        for key, model in keys.items()
        for name, tensor in model.items()
        if isinstance(tensor, torch.Tensor)
    }
    assert list(index.model_tensors()) == list(expected)
    reader = CheckpointReader(index)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in expected.items())
    rest = index.tensors.keys() - expected.keys()
    assert f"optimizer.{index.ranks[0]}/optimizer/state.0.exp_avg" in rest
    assert f"common_state/{index.ranks[0]}/rng_state/0.torch_rng_state" in rest


def test_strided_and_empty_tensors_are_read(tmp_path) -> None:
    models = random_models("one", 4)
    model = models["mp_rank_00"]["model"]
    model["turned.weight"] = torch.arange(12.0).view(3, 4).T
    model["empty.weight"] = torch.empty(0, 3)
    model["scalar"] = torch.tensor(2.5)
    model["parameter"] = torch.nn.Parameter(torch.ones(3))
    index = open_checkpoint(write_legacy(tmp_path / "iter_0000003", "one", models))
    reader = CheckpointReader(index)
    for name in ("turned.weight", "empty.weight", "scalar", "parameter"):
        assert torch.equal(reader.read(f"mp_rank_00/model/{name}"), model[name])


def test_nested_dictionaries_of_old_models_are_followed(tmp_path) -> None:
    nested = {"language_model": {"encoder": {"weight": torch.ones(2)}}}
    models = {"mp_rank_00": {"model": nested}}
    index = open_checkpoint(write_legacy(tmp_path / "iter_0000003", "one", models))
    assert list(index.model_tensors()) == ["mp_rank_00/model/language_model.encoder.weight"]


@pytest.mark.parametrize("layout", RANKS)
def test_parts_are_counted_and_copies_are_not(tmp_path, layout) -> None:
    models = random_models(layout, 4, torch.float32)
    index = read_legacy(write_legacy(tmp_path / "iter_0000003", layout, models))
    found = copies([index])
    ranks = index.ranks
    assert not any(name.startswith(f"{ranks[0]}/model") and NORM in name for name in found)
    if layout in ("tensor", "expert"):
        assert f"{ranks[1]}/model/{NORM}" in found
    assert any(name.endswith("output_layer.weight") for name in found) == (
        layout in ("pipeline", "virtual", "both")
    )
    assert (f"{ranks[-1]}/model/{EMBEDDING}" in found) == (layout == "expert")
    assert not any("linear_fc1" in name and layout != "expert" for name in found)
    assert not any("local_experts" in name for name in found)


def test_copies_must_be_equal_in_every_checkpoint(tmp_path) -> None:
    folders, models = write_legacy_family(tmp_path, "tensor")
    bias = "decoder.layers.0.mlp.linear_fc1.bias"  # a part per rank, zero in the base
    for name, ranks in models.items():
        for number, rank in enumerate(ranks):
            value = torch.zeros(5) if name == "base" else torch.full((5,), 1.0 + number)
            ranks[rank]["model"][bias] = value
        write_legacy(folders[name], "tensor", ranks)
    base, expert = (read_legacy(folders[name]) for name in ("base", "a"))
    assert f"mp_rank_01/model/{bias}" in copies([base])
    assert f"mp_rank_01/model/{bias}" not in copies([base, expert])
    assert f"mp_rank_01/model/{NORM}" in copies([base, expert])


def test_other_rooms_refuse_the_format_and_say_how_to_convert_it(tmp_path) -> None:
    folders, _ = write_legacy_family(tmp_path, "one")
    with pytest.raises(CheckpointError, match="--ckpt-convert-format torch_dist"):
        resolve(folders["a"])


def test_saves_newer_than_the_tracker_are_not_complete(tmp_path) -> None:
    models = random_models("one", 1)
    for step in (2, 4, 6):
        write_legacy(tmp_path / f"iter_{step:07d}", "one", models, step)
    assert [step for step, _ in all_saves(tmp_path)] == [2, 4, 6]
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    assert [step for step, _ in all_saves(tmp_path)] == [2, 4]
    index = open_checkpoint(tmp_path)
    assert index.iteration == common_of(index)["iteration"] == 4


def test_ranks_of_a_grid_with_holes_are_accepted_only_for_moe_experts_of_their_own(tmp_path):
    folder = write_legacy(tmp_path / "iter_0000003", "both", random_models("both", 1))
    names = {"mp_rank_00_000": "mp_rank_00_000", "mp_rank_01_001": "mp_rank_01_001"}
    for rank in RANKS["both"][1]:
        if rank not in names:
            (folder / rank / FILE).unlink()
            (folder / rank).rmdir()
    for expert_tensor, accepted in ((2, False), (1, True)):
        args = argparse.Namespace(
            tensor_model_parallel_size=2,
            expert_model_parallel_size=2,
            expert_tensor_parallel_size=expert_tensor,
        )
        for rank in names:
            state = {"args": args, "model": {"weight": torch.ones(2)}}
            torch.save(state, folder / rank / FILE)
        if accepted:
            assert read_legacy(folder).sizes == {"tensor": 2, "pipeline": 1, "expert": 2}
        else:
            with pytest.raises(CheckpointError, match="lacks mp_rank_00_001, mp_rank_01_000"):
                read_legacy(folder)


@pytest.mark.parametrize("sizes", [(2, "x"), (1 << 40, 1 << 40), (0, 1), (-1, -1)])
def test_impossible_sizes_are_refused(tmp_path, sizes) -> None:
    args = argparse.Namespace(
        tensor_model_parallel_size=sizes[0], pipeline_model_parallel_size=sizes[1]
    )
    models = random_models("one", 1)
    write_legacy(tmp_path / "iter_0000003", "one", models, args=args)
    with pytest.raises(CheckpointError, match="impossible parallel sizes"):
        open_checkpoint(tmp_path / "iter_0000003")


def test_ranks_beyond_those_of_the_arguments_are_refused(tmp_path) -> None:
    folder = write_legacy(tmp_path / "iter_0000003", "tensor", random_models("tensor", 1))
    (folder / "mp_rank_02").mkdir()
    with pytest.raises(CheckpointError, match="has mp_rank_02 beside them"):
        open_checkpoint(folder)


def test_a_shape_beyond_the_storage_is_refused(tmp_path) -> None:
    models = random_models("one", 1)
    folder = write_legacy(tmp_path / "iter_0000003", "one", models)
    path = folder / "mp_rank_00" / FILE
    whole = path.read_bytes()
    # (4, 6) of the MoE expert's weight, then its strides (6, 1), in the pickle
    shape = re.compile(rb"(K\x04K\x06\x86)")
    assert len(shape.findall(whole)) == 1
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, shape.sub(b"K\x7fK\x06\x86", data))
    with pytest.raises(CheckpointError, match=r"local_experts.0.*fewer elements than its shape"):
        open_checkpoint(folder)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    folder = write_legacy(tmp_path / "iter_0000003", "one", random_models("one", 1))
    torch.save([1, 2], folder / "mp_rank_00" / FILE)
    with pytest.raises(CheckpointError, match="not a dictionary"):
        open_checkpoint(folder)
