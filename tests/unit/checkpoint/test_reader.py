from __future__ import annotations

import os
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mergemix.checkpoint.metadata import read_index
from megatron_mergemix.checkpoint.reader import CheckpointReader
from megatron_mergemix.errors import CheckpointError
from tests.support.torch_dist import write_checkpoint

WEIGHT = torch.arange(2 * 12 * 10).reshape(2, 12, 10).bfloat16()
GRID = (2, 3, 2)


@pytest.fixture
def reader(tmp_path):
    folder = write_checkpoint(
        tmp_path,
        {"w": WEIGHT, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)},
        {"w": GRID},
        objects={"w._extra_state/shard_0_1": b"opaque"},
    )
    return CheckpointReader(read_index(folder))


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a, b)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_region_of_any_chunking_is_read_bit_for_bit(data, tmp_path_factory):
    shape = data.draw(st.lists(st.integers(1, 6), max_size=4))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]))
    tensor = torch.randint(0, 100, shape).to(dtype)
    grid = [data.draw(st.integers(1, size)) for size in shape]
    begin = [data.draw(st.integers(0, size)) for size in shape]
    sizes = [data.draw(st.integers(0, s - b)) for s, b in zip(shape, begin, strict=True)]
    expected = tensor
    for dim, (start, size) in enumerate(zip(begin, sizes, strict=True)):
        expected = expected.narrow(dim, start, size)
    folder = tmp_path_factory.mktemp("region")
    reader = CheckpointReader(read_index(write_checkpoint(folder, {"w": tensor}, {"w": grid})))
    assert same(reader.read("w", begin, sizes), expected)
    assert same(reader.read("w"), tensor)


def test_nan_payloads_and_negative_zeros_survive(tmp_path):
    bits = torch.tensor([0x7FC0, 0x7FC1, -0x8000, 0x7F80, 1], dtype=torch.int16)
    folder = write_checkpoint(tmp_path, {"w": bits.view(torch.bfloat16)}, {"w": (2,)})
    read = CheckpointReader(read_index(folder)).read("w")
    assert torch.equal(read.view(torch.int16), bits)


def test_a_scalar_and_an_empty_tensor_are_read(reader):
    assert same(reader.read("scalar"), torch.tensor(2.5))
    assert same(reader.read("empty"), torch.zeros(0, 3))


def test_sizes_default_to_the_rest_of_the_tensor(reader):
    assert same(reader.read("w", (1, 5, 3)), WEIGHT[1:, 5:, 3:])


@pytest.mark.parametrize("strided", [False, True])
def test_a_region_is_read_into_what_is_given(strided, reader):
    home = torch.full((10, 12), -1.0, dtype=torch.bfloat16)
    out = home.t()[2:9] if strided else torch.empty(7, 10, dtype=torch.bfloat16)
    out = out.unsqueeze(0)
    assert reader.read("w", (1, 3, 0), (1, 7, 10), out) is out
    assert torch.equal(out[0], WEIGHT[1, 3:10])
    if strided:
        assert (home.t()[:2] == -1).all()
        assert (home.t()[9:] == -1).all()


def test_a_transposed_tensor_is_read_in_its_own_order(tmp_path):
    folder = tmp_path / "iter_0000001"
    write_checkpoint(folder, {"w": WEIGHT[0].t()}, {"w": (1, 1)})
    reader = CheckpointReader(read_index(folder))
    assert same(reader.read("w"), WEIGHT[0].t())
    assert same(reader.read("w", (3, 2), (5, 7)), WEIGHT[0].t()[3:8, 2:9])


def test_a_region_is_read_without_reading_the_rest(tmp_path):
    """Rows that lie together are one read of just these rows: the file may end after them."""
    folder = write_checkpoint(tmp_path, {"w": torch.arange(8000.0).reshape(80, 100)}, num_files=1)
    calls = []
    real = os.preadv

    def spy(descriptor, buffers, position):
        calls.append(len(buffers[0]))
        return real(descriptor, buffers, position)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", spy)
        rows = CheckpointReader(read_index(folder)).read("w", (10, 0), (3, 100))
    assert torch.equal(rows, torch.arange(1000.0, 1300.0).reshape(3, 100))
    assert calls == [3 * 100 * 4]


def test_short_reads_are_continued(reader, monkeypatch):
    real = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, buffers, position: real(fd, [buffers[0][:3]], position)
    )
    assert same(reader.read("w"), WEIGHT)


def test_opaque_entries_are_read_as_they_are(reader):
    assert reader.read_bytes("w._extra_state/shard_0_1") == b"opaque"


def test_threads_share_a_reader(reader):
    results = []
    threads = [threading.Thread(target=lambda: results.append(reader.read("w"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(same(result, WEIGHT) for result in results)


def test_unknown_names_are_named(reader):
    with pytest.raises(CheckpointError, match="has no tensor v"):
        reader.read("v")
    with pytest.raises(CheckpointError, match="has no entry w"):
        reader.read_bytes("w")


@pytest.mark.parametrize(
    ("begin", "sizes"),
    [((0, 0, 1), (2, 12, 10)), ((-1, 0, 0), (1, 1, 1)), ((0, 0), (2, 12)), ((0, 0, 0), (1, 1, -1))],
)
def test_a_region_outside_the_tensor_is_refused(begin, sizes, reader):
    with pytest.raises(ValueError, match="is not in w"):
        reader.read("w", begin, sizes)


@pytest.mark.parametrize("out", [torch.empty(2, 12, 9).bfloat16(), torch.empty(2, 12, 10)])
def test_a_destination_that_does_not_fit_is_refused(out, reader):
    with pytest.raises(ValueError, match="out does not fit"):
        reader.read("w", out=out)


def test_a_missing_file_is_named(reader):
    (reader.index.path / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match="__1_0.distcp cannot be read: No such file"):
        reader.read("w")


def test_a_short_file_is_named(reader):
    path = reader.index.path / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:3])
    with pytest.raises(CheckpointError, match="ends at byte 3, expected at least 6"):
        reader.read_bytes("w._extra_state/shard_0_1")
    with pytest.raises(CheckpointError, match=r"__0_0.distcp, bytes \d+ to \d+ \(w\): not a"):
        reader.read("w")


def test_files_of_another_save_are_noticed(tmp_path):
    ours = write_checkpoint(tmp_path / "a", {"w": torch.ones(4, 3)})
    theirs = write_checkpoint(tmp_path / "b", {"w": torch.ones(3, 4)})
    (theirs / "__0_0.distcp").replace(ours / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"float32 \(3, 4\) where the metadata says float32"):
        CheckpointReader(read_index(ours)).read("w")


def test_untiled_optimizer_state_cannot_be_read(tmp_path):
    name = "optimizer.state.exp_avg.w"
    folder = write_checkpoint(tmp_path, {name: torch.ones(4)}, {name: (2,)})
    index = read_index(folder)
    entry = index.tensors[name]
    broken = type(entry)(entry.shape, entry.dtype, entry.chunks[:1])
    index = type(index)(index.path, None, {name: broken}, {})
    with pytest.raises(CheckpointError, match="do not tile"):
        CheckpointReader(index).read(name)
