"""Archives of objects that hold many tensors: read and written without executing anything."""

from __future__ import annotations

import argparse
import os
import zlib
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from megatron_mergemix.checkpoint.archive import DamagedArchiveError, stored_object
from megatron_mergemix.checkpoint.archive_writer import ObjectArchive
from megatron_mergemix.checkpoint.inert_pickle import Inert, load_symbols
from megatron_mergemix.checkpoint.pickle_writer import dumps


def read(path: Path) -> tuple[bytes, dict[str, tuple[int, int, int]]]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return stored_object(descriptor, 0, path.stat().st_size)
    finally:
        os.close(descriptor)


def rewritten(path: Path, target: Path) -> None:
    """Write the archive in ``path`` anew from what was read of it."""
    pickle, storages = read(path)
    places = [storages[str(number)] for number in range(len(storages))]
    archive = ObjectArchive(dumps(load_symbols(pickle)), tuple(p[1] for p in places))
    with path.open("rb") as source, target.open("wb") as file:
        for position, data in archive.frame([crc for _, _, crc in places]):
            file.seek(position)
            file.write(data)
        for start, (begin, length, _) in zip(archive.starts(), places, strict=True):
            source.seek(begin)
            file.seek(start)
            file.write(source.read(length))


def test_what_torch_saved_is_read_symbolically_and_written_again(tmp_path: Path) -> None:
    buffer = torch.arange(12, dtype=torch.bfloat16)
    model = torch.nn.Linear(3, 2).state_dict()  # an OrderedDict with versions in _metadata
    value = {
        "args": argparse.Namespace(lr=0.5, path=None),
        "model": OrderedDict(a=buffer[2:6], b=buffer[6:].view(2, 3).T, empty=torch.empty(0)),
        "linear": model,
        3: [torch.float16, (1 << 70, -1, True)],
    }
    torch.save(value, tmp_path / "one.pt")
    rewritten(tmp_path / "one.pt", tmp_path / "two.pt")
    torch.serialization.add_safe_globals([argparse.Namespace])
    found = torch.load(tmp_path / "two.pt", weights_only=True)
    assert found["args"] == value["args"]
    assert found[3] == value[3]
    for name, tensor in value["model"].items():
        assert torch.equal(found["model"][name], tensor)
    assert type(found["linear"]) is OrderedDict
    assert found["linear"]._metadata == model._metadata
    assert torch.equal(found["linear"]["weight"], model["weight"])


def test_items_of_an_object_are_kept_apart_from_its_state(tmp_path: Path) -> None:
    torch.save(OrderedDict(a=1), tmp_path / "one.pt")
    value = load_symbols(read(tmp_path / "one.pt")[0])
    assert isinstance(value, Inert)
    assert (value.kind, value.items, value.state) == ("collections OrderedDict", {"a": 1}, None)


def test_storages_beyond_four_gigabytes_are_found(tmp_path: Path) -> None:
    value = {"big": torch.empty(0, dtype=torch.uint8), "small": torch.arange(5)}
    torch.save(value, tmp_path / "one.pt")
    symbols = load_symbols(read(tmp_path / "one.pt")[0])
    big = (1 << 32) + 8
    small = torch.arange(5).numpy().tobytes()
    symbols["big"].args[0].state = (*symbols["big"].args[0].state[:4], big)
    archive = ObjectArchive(dumps(symbols), (big, len(small)))
    with (tmp_path / "two.pt").open("wb") as file:  # mostly a hole
        for position, data in archive.frame([0, zlib.crc32(small)]):
            file.seek(position)
            file.write(data)
        file.seek(archive.starts()[1])
        file.write(small)
    _, storages = read(tmp_path / "two.pt")
    assert [storages[key][:2] for key in "01"] == [
        (start, length) for start, length in zip(archive.starts(), (big, len(small)), strict=True)
    ]
    found = torch.load(tmp_path / "two.pt", weights_only=True, mmap=True)
    assert torch.equal(found["small"], torch.arange(5))


def test_more_entries_than_a_plain_zip_file_can_count(tmp_path: Path) -> None:
    count = 70_000
    archive = ObjectArchive(dumps([]), (0,) * count)
    (tmp_path / "one.pt").write_bytes(b"")
    with (tmp_path / "one.pt").open("r+b") as file:
        for position, data in archive.frame([0] * count):
            file.seek(position)
            file.write(data)
    assert len(read(tmp_path / "one.pt")[1]) == count


@pytest.mark.parametrize("keep", [0, 10, 200, -1, -30])
def test_a_truncated_archive_is_refused(tmp_path: Path, keep: int) -> None:
    torch.save({"a": torch.arange(50)}, tmp_path / "one.pt")
    (tmp_path / "one.pt").write_bytes((tmp_path / "one.pt").read_bytes()[:keep])
    with pytest.raises(DamagedArchiveError):
        read(tmp_path / "one.pt")
