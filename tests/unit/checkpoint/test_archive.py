from __future__ import annotations

import io
import os
import pickle
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mergemix.checkpoint.archive import (
    DamagedArchiveError,
    StoredTensor,
    stored_tensor,
)
from megatron_mergemix.checkpoint.index import DTYPE_BYTES

PREFIX = b"another archive"


def archive(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def locate(data, path):
    path.write_bytes(PREFIX + data + b"the next one")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return stored_tensor(descriptor, len(PREFIX), len(data))
    finally:
        os.close(descriptor)


def element_bytes(stored, path):
    """The bytes of the elements, one by one in row-major order."""
    content, size = path.read_bytes(), DTYPE_BYTES[stored.dtype]
    indices = torch.cartesian_prod(*(torch.arange(n) for n in (1, *stored.sizes)))
    positions = [
        stored.position + size * sum(i * s for i, s in zip(row[1:], stored.strides, strict=True))
        for row in indices.reshape(-1, 1 + len(stored.sizes)).tolist()
    ]
    return b"".join(content[p : p + size] for p in positions)


TENSORS = {
    "contiguous": torch.arange(24.0).reshape(2, 3, 4),
    "transposed": torch.arange(12).reshape(3, 4).bfloat16().t(),
    "part of a storage": torch.arange(24.0)[5:11].reshape(2, 3),
    "every other": torch.arange(24.0)[::2],
    "expanded": torch.arange(3.0).expand(4, 3),
    "scalar": torch.tensor(3.5),
    "parameter": torch.nn.Parameter(torch.arange(3.0)),
    "empty": torch.zeros(0, 3),
}


@pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS.keys())
def test_the_elements_lie_where_it_says(tensor, tmp_path):
    stored = locate(archive(tensor), tmp_path / "f")
    assert (stored.sizes, stored.strides) == (tuple(tensor.shape), tensor.stride())
    if tensor.numel():
        raw = bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
        assert element_bytes(stored, tmp_path / "f") == raw


@pytest.mark.parametrize("name", DTYPE_BYTES)
def test_every_dtype_is_located(name, tmp_path):
    tensor = torch.arange(7).to(getattr(torch, name))
    stored = locate(archive(tensor), tmp_path / "f")
    assert (stored.dtype, stored.sizes) == (name, (7,))
    raw = bytes(tensor.view(torch.uint8).numpy())
    assert element_bytes(stored, tmp_path / "f") == raw


@pytest.mark.parametrize(
    "value",
    [{"w": torch.ones(2)}, [torch.ones(2)], 3, torch.ones(2).to_sparse(), io.BytesIO()],
)
def test_anything_but_one_dense_tensor_is_refused(value, tmp_path):
    with pytest.raises(DamagedArchiveError):
        locate(archive(value), tmp_path / "f")


def rezipped(changes, compress=zipfile.ZIP_STORED):
    """The archive of three floats with some entries replaced; None removes one."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(archive(torch.arange(3.0)))) as old,
        zipfile.ZipFile(buffer, "w", compress) as new,
    ):
        for name in old.namelist():
            content = changes.get(name.removeprefix("archive/"), old.read(name))
            if content is not None:
                new.writestr(name, content)
    return buffer.getvalue()


class Payload:
    def __reduce__(self):
        return os.system, ("exit 1",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.pkl": None}, "no data.pkl"),
        ({"data.pkl": pickle.dumps(Payload(), 2)}, "system' would execute code"),
        ({"data.pkl": b"x" * 70000}, "too long"),
        ({"data/0": None}, "data/0"),
        ({"data/0": b"12345678901"}, "fewer elements"),
        ({"byteorder": b"big"}, "not little-endian"),
    ],
)
def test_a_planted_or_damaged_entry_is_named(changes, message, tmp_path):
    assert locate(rezipped({}), tmp_path / "f").sizes == (3,)
    with pytest.raises(DamagedArchiveError, match=message):
        locate(rezipped(changes), tmp_path / "f")


def test_an_archive_without_byteorder_of_old_torch_is_read(tmp_path):
    assert locate(rezipped({"byteorder": None}), tmp_path / "f").sizes == (3,)


def test_compressed_entries_are_refused(tmp_path):
    with pytest.raises(DamagedArchiveError, match="compressed"):
        locate(rezipped({}, zipfile.ZIP_DEFLATED), tmp_path / "f")


def test_a_truncated_archive_is_refused(tmp_path):
    data = archive(torch.arange(3.0))
    for length in (0, 10, len(data) // 2, len(data) - 1):
        with pytest.raises(DamagedArchiveError):
            locate(data[:length], tmp_path / "f")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_flipped_archive_is_refused_or_stays_within_its_bytes(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "flipped"
    content = bytearray(archive(torch.arange(3.0)))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        stored = locate(bytes(content), path)
    except DamagedArchiveError:
        return
    assert isinstance(stored, StoredTensor)
    reach = sum((n - 1) * s for n, s in zip(stored.sizes, stored.strides, strict=True))
    end = stored.position + (reach + 1) * DTYPE_BYTES[stored.dtype]
    assert stored.position >= len(PREFIX)
    assert 0 in stored.sizes or end <= len(PREFIX) + len(content)
