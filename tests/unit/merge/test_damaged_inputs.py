"""Damaged and hostile inputs: a clear error or exactly the right result; nothing is executed."""

from __future__ import annotations

import argparse
import io
import pickle
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_mergemix.checkpoint.index import CheckpointIndex
from megatron_mergemix.checkpoint.metadata import read_index
from megatron_mergemix.checkpoint.metadata_writer import metadata_bytes
from megatron_mergemix.checkpoint.reader import CheckpointReader
from megatron_mergemix.errors import CheckpointError
from megatron_mergemix.merge.checkpoints import Settings, merge_checkpoints
from megatron_mergemix.merge.methods import Recipe
from tests.support.checkpoint_family import EXTRA_STATE, saved_object, write_family, write_save
from tests.unit.merge.test_checkpoints import data_of, tensors

ROUNDS = 150


def merge(folders: dict[str, Path], target: Path) -> Path:
    experts = {name: (folders[name], 0.5) for name in ("a", "b")}
    settings = Settings(threads=1)
    return merge_checkpoints(
        folders["base"], experts, Recipe("linear", ()), target, settings, {}
    ).folder


def extra_state(folder: Path) -> object:
    """Return what Megatron would load; filling bytes of an archive have no checksum."""
    data = CheckpointReader(read_index(folder)).read_bytes(EXTRA_STATE)
    return torch.load(io.BytesIO(data), weights_only=True)


def damage(folder: Path, rng: random.Random) -> str:
    """Damage one file of a save and say how."""
    path = rng.choice(sorted(path for path in folder.iterdir()))
    data = bytearray(path.read_bytes())
    kind = rng.choice(["truncate", "flip", "flip", "zeros", "delete", "swap", "grow", "noise"])
    at = rng.randrange(len(data))
    if kind == "truncate":
        del data[at:]
    elif kind == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    elif kind == "noise":
        data[at : at + 16] = rng.randbytes(len(data[at : at + 16]))
    elif kind == "grow":
        data[at:at] = rng.randbytes(7)
    elif kind == "swap":
        other = rng.choice(sorted(path for path in folder.iterdir()))
        data, theirs = bytearray(other.read_bytes()), data
        other.write_bytes(theirs)
    path.write_bytes(data)
    if kind == "delete":
        path.unlink()
    return f"{kind} {path.name} at {at}"


def test_damage_anywhere_is_an_error_or_changes_nothing(tmp_path: Path) -> None:
    folders, _ = write_family(tmp_path / "sound")
    expected = tensors(merge(folders, tmp_path / "expected"))
    refused = 0
    for seed in range(ROUNDS):
        rng = random.Random(seed)
        which = rng.choice(sorted(folders))
        copy = tmp_path / "copy" / "iter_0000003"
        shutil.copytree(folders[which], copy)
        what = f"seed {seed}, {which}: {damage(copy, rng)}"
        try:
            folder = merge({**folders, which: copy}, tmp_path / "out")
        except CheckpointError as error:
            refused += 1
            message = str(error)
            assert len(message) > 20, what
            assert not list(tmp_path.glob("*out*")), what
        else:
            found = tensors(folder)
            assert found.keys() == expected.keys(), what
            assert all(torch.equal(found[name], expected[name]) for name in found), what
            assert extra_state(folder) == [b"extra"], what
        shutil.rmtree(tmp_path / "copy")
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert ROUNDS / 3 < refused < ROUNDS


def test_a_flipped_bit_in_the_name_of_an_extra_state_is_never_merged(tmp_path: Path) -> None:
    folders, _ = write_family(tmp_path)
    path = folders["base"] / ".metadata"
    good = path.read_bytes()
    first = good.index(EXTRA_STATE.encode())
    assert good.count(EXTRA_STATE.encode()) == 1, "the name stands there once"
    for at in range(len(EXTRA_STATE)):
        data = bytearray(good)
        data[first + at] ^= 1 << at % 8
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"has other names: .*\.metadata|damaged"):
            merge(folders, tmp_path / "out")


def test_two_extra_states_of_one_name_are_refused(tmp_path: Path) -> None:
    folders, _ = write_family(tmp_path)
    path = folders["base"] / ".metadata"
    other = EXTRA_STATE.replace("shard_0", "shard_1").encode()
    path.write_bytes(path.read_bytes().replace(other, EXTRA_STATE.encode()))
    with pytest.raises(CheckpointError, match="two places in files"):
        merge(folders, tmp_path / "out")


@pytest.mark.parametrize("bit", range(0, 16, 3))
def test_a_flipped_bit_in_the_weights_is_never_merged(tmp_path: Path, bit: int) -> None:
    folders, models = write_family(tmp_path)
    needle = models["b"]["decoder.final_layernorm.weight"].view(torch.uint8).numpy().tobytes()
    (path,) = [p for p in folders["b"].glob("*.distcp") if needle in p.read_bytes()]
    data = bytearray(path.read_bytes())
    data[data.index(needle) + 2 + bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="decoder.final_layernorm.weight .* have changed"):
        merge(folders, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("whose", ["base", "a"])
def test_a_model_that_modelopt_has_changed_is_refused(tmp_path: Path, whose: str) -> None:
    folders, _ = write_family(tmp_path)
    (folders[whose] / "modelopt_state").mkdir()
    with pytest.raises(CheckpointError, match="ModelOpt has changed"):
        merge(folders, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("place", [".metadata", "common.pt", "args", "tensor", "extra state"])
def test_a_planted_pickle_is_never_executed(tmp_path: Path, place: str) -> None:
    folders, models = write_family(tmp_path)
    mark, base = tmp_path / "executed", folders["base"]
    payload = Payload(mark)
    if place == ".metadata":
        (base / ".metadata").write_bytes(pickle.dumps({"x": payload}))
    elif place == "common.pt":
        (base / "common.pt").write_bytes(saved_object({"args": payload}))
    elif place == "args":
        args = argparse.Namespace(seq_length=8, evil=payload)
        write_save(base, models["base"], args=args)
    elif place == "tensor":
        replace_entry(folders["a"], "decoder.final_layernorm.weight", saved_object(payload))
    else:
        replace_entry(base, EXTRA_STATE, saved_object(payload))
    with pytest.raises(CheckpointError):
        merge(folders, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
    assert not mark.exists()


def replace_entry(folder: Path, name: str, data: bytes) -> None:
    """Put other bytes where an entry lies, and describe them in the metadata."""
    index = read_index(folder)
    entry = index.bytes_entries.get(name)
    place = index.tensors[name].chunks[0] if entry is None else entry
    path = folder / place.file
    start = path.stat().st_size
    path.write_bytes(path.read_bytes() + data)
    moved = replace(place, file_offset=start, length=len(data))
    tensors, objects = dict(index.tensors), dict(index.bytes_entries)
    if entry is None:
        tensors[name] = replace(tensors[name], chunks=(moved,))
    else:
        objects[name] = moved
    new = CheckpointIndex(folder, index.iteration, tensors, objects)
    (folder / ".metadata").write_bytes(metadata_bytes(new))


def test_a_huge_declared_size_is_refused_without_allocating_it(tmp_path: Path) -> None:
    folders, _ = write_family(tmp_path)
    index = read_index(folders["base"])
    name = "decoder.final_layernorm.weight"
    (chunk,) = index.tensors[name].chunks
    huge = replace(chunk, sizes=(1 << 50,))
    tensors = {
        **index.tensors,
        name: replace(index.tensors[name], shape=(1 << 50,), chunks=(huge,)),
    }
    damaged = metadata_bytes(replace(index, tensors=tensors))
    (folders["base"] / ".metadata").write_bytes(damaged)
    with pytest.raises(CheckpointError, match="bytes for"):
        merge(folders, tmp_path / "out")


def test_files_of_another_save_under_the_right_names_are_refused(tmp_path: Path) -> None:
    folders, models = write_family(tmp_path)
    other = {name: tensor.float() for name, tensor in models["a"].items()}
    foreign = write_save(tmp_path / "foreign" / "iter_0000003", other, 1)
    for path in foreign.glob("*.distcp"):
        shutil.copy(path, folders["a"] / path.name)
    with pytest.raises(CheckpointError):
        merge(folders, tmp_path / "out")


def test_quantised_parameters_are_refused(tmp_path: Path) -> None:
    folders, models = write_family(tmp_path)
    for name, model in models.items():
        model["decoder.layers.mlp.linear_fc1.weight"] = model[
            "decoder.layers.mlp.linear_fc1.weight"
        ].to(torch.float8_e4m3fn)
        write_save(folders[name], model)
    with pytest.raises(CheckpointError, match="quantised"):
        merge(folders, tmp_path / "out")


def test_the_same_inputs_give_the_same_files_again(tmp_path: Path) -> None:
    folders, _ = write_family(tmp_path)
    merge(folders, tmp_path / "one")
    merge(folders, tmp_path / "two")
    assert data_of(tmp_path / "one") == data_of(tmp_path / "two")
