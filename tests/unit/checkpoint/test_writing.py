"""Archives, pickles, checksums and metadata that we write, read by torch and by the standard."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pickle
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mergemix.checkpoint import archive_writer, crc, pickle_writer, writer
from megatron_mergemix.checkpoint.archive_writer import STORAGES, TensorArchive
from megatron_mergemix.checkpoint.common_state import arguments, merged_common, read_common
from megatron_mergemix.checkpoint.inert_pickle import Inert, RefusedPickle, load_symbols
from megatron_mergemix.checkpoint.metadata import read_index
from megatron_mergemix.checkpoint.metadata_writer import metadata_bytes
from megatron_mergemix.checkpoint.pickle_writer import dumps
from megatron_mergemix.errors import CheckpointError
from tests.support.checkpoint_family import random_model, saved_object, write_save

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


def archive_of(tensor: torch.Tensor) -> bytes:
    name = str(tensor.dtype).removeprefix("torch.")
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    archive = TensorArchive(name, tuple(tensor.shape))
    before, after = archive.frame(zlib.crc32(data))
    assert archive.lengths() == (len(before), len(before + data + after))
    assert len(before) % 64 == 0
    return before + data + after


@pytest.mark.parametrize("dtype", STORAGES)
@pytest.mark.parametrize("sizes", [(), (3,), (2, 3, 5), (0, 4)])
@pytest.mark.parametrize("big", [False, True], ids=["", "zip64"])
def test_torch_loads_our_archives(dtype, sizes, big, monkeypatch) -> None:
    if big:
        monkeypatch.setattr(archive_writer, "ZIP64_FROM", 20)
    tensor = (torch.randn(sizes) * 10).to(getattr(torch, dtype))
    data = archive_of(tensor)
    loaded = torch.load(io.BytesIO(data), weights_only=True)
    assert torch.equal(loaded, tensor)
    assert loaded.dtype == tensor.dtype
    assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=4))
def test_the_crc_of_pieces_is_the_crc_of_the_whole(data, cuts) -> None:
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = [(a, b - a, zlib.crc32(data[a:b])) for a, b in zip(edges, edges[1:], strict=False)]
    assert crc.of_pieces(reversed(pieces), len(data)) == zlib.crc32(data)
    if len(pieces) > 1:
        assert crc.of_pieces(pieces[1:], len(data)) is None


@settings(max_examples=200)
@given(plain)
def test_plain_values_survive_our_pickles(value) -> None:
    assert pickle.loads(dumps(value)) == value
    if not isinstance(value, dict):  # our reader allows few kinds of keys
        assert load_symbols(dumps(value)) == value


def test_objects_survive_reading_and_writing_without_their_classes() -> None:
    namespace = argparse.Namespace(a=1, path=Path("/x"), dtype=torch.bfloat16, size=torch.Size([2]))
    symbols = load_symbols(pickle.dumps(namespace, protocol=2))
    assert isinstance(symbols, Inert)
    assert pickle.loads(dumps(symbols)) == namespace


def test_values_that_cannot_be_written_are_an_error() -> None:
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    for value in (nested, object(), {1j: 2}):
        with pytest.raises(TypeError):
            dumps(value)


def test_torch_reads_our_metadata_as_its_own(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    folder = write_save(tmp_path / "iter_0000003", random_model(0), 2)
    theirs = FileSystemReader(folder).read_metadata()
    index = read_index(folder)
    (folder / ".metadata").write_bytes(metadata_bytes(index))
    ours = FileSystemReader(folder).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
    assert read_index(folder) == index


def test_the_common_state_is_read_without_its_classes(tmp_path: Path) -> None:
    folder = write_save(tmp_path / "iter_0000003", random_model(0))
    common = read_common(read_index(folder))
    assert arguments(common)["seq_length"] == 8
    assert common["optimizer"]["param_groups"][0]["lr"] == 0.1
    kept = merged_common(read_index(folder), {"by": "us"}, "common.pt")
    assert "optimizer" not in kept


def test_classes_beyond_megatrons_arguments_are_refused(tmp_path: Path) -> None:
    args = argparse.Namespace(lock=zipfile.ZipInfo("x"))
    folder = write_save(tmp_path / "iter_0000003", random_model(0), args=args)
    with pytest.raises(CheckpointError, match="zipfile.ZipInfo"):
        merged_common(read_index(folder), {}, "common.pt")


@settings(max_examples=60)
@given(st.data())
def test_damaged_pickles_never_crash_the_reader_of_symbols(data) -> None:
    good = bytearray(pickle.dumps(argparse.Namespace(a=[1, 2.5, "x"], b=torch.Size([2])), 2))
    at = data.draw(st.integers(0, len(good) - 1))
    good[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(RefusedPickle):  # anything else is a bug
        load_symbols(bytes(good))


def test_a_common_state_that_is_no_archive_is_an_error(tmp_path: Path) -> None:
    folder = write_save(tmp_path / "iter_0000003", random_model(0))
    for content in (b"", b"x" * 99, saved_object([1, 2])):
        (folder / "common.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match="common state"):
            read_common(read_index(folder))


def test_what_tells_the_architecture_of_our_own_models_is_kept(tmp_path: Path) -> None:
    folder = write_save(tmp_path / "iter_0000003", random_model(0))
    shown = {"num_attention_heads": 4, "activation": "swiglu", "norm_epsilon": 1e-5}
    common = {"mergemix_model": shown, "iteration": 3, "optimizer": {"lr": 0.1}}
    (folder / "common.pt").write_bytes(saved_object(common))
    assert merged_common(read_index(folder), {}, "common.pt") == {
        "mergemix_model": shown,
        "iteration": 0,
        "mergemix": {},
    }


def test_metadata_may_be_longer_than_what_was_read_may_become(monkeypatch, tmp_path) -> None:
    """A chunk per MoE expert and rank: 100 MB are met."""
    monkeypatch.setattr(pickle_writer, "MAX_BYTES", 100)
    root = write_save(tmp_path / "root", random_model(0))
    with pytest.raises(TypeError, match="too long"):
        dumps([["x"] * 100, [1]])
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / ".metadata").write_bytes(metadata_bytes(read_index(root)))
    assert read_index(tmp_path / "again").tensors == read_index(root).tensors


def test_many_files_are_written_through_few_descriptors(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(writer, "MOST_OPEN", 3)
    output = SimpleNamespace(index=SimpleNamespace(path=tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    names = [f"__{number}_0.distcp" for number in range(20)]

    def work(place: int) -> None:
        for name in names[place:] + names[:place]:
            files.write(name, place, bytes([place]))

    with writer.OpenFiles(output) as files:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(20)))
        assert len(os.listdir("/proc/self/fd")) - before <= 3 + 4 + 1  # and that of the listing
        files.sync()
    assert {(tmp_path / name).read_bytes() for name in names} == {bytes(range(20))}
    assert len(os.listdir("/proc/self/fd")) == before
