from __future__ import annotations

import os
import shutil

import pytest
import torch

from megatron_mergemix.checkpoint import fingerprint as module
from megatron_mergemix.checkpoint.fingerprint import BLOCK_BYTES, fingerprint
from megatron_mergemix.checkpoint.metadata import read_index
from megatron_mergemix.errors import CheckpointError
from tests.support.torch_dist import write_checkpoint

WEIGHTS = torch.arange(600_000.0).reshape(600, 1000)  # 2.4 MB
FEW_BLOCKS = 8  # 0.5 MB of them


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "iter_0000001", {"w": WEIGHTS}, num_files=1)


def digest(folder):
    return fingerprint(read_index(folder))


def test_it_is_64_hexadecimal_digits(folder):
    assert len(digest(folder)) == 64
    assert int(digest(folder), 16) > 0


def test_a_copy_elsewhere_and_later_has_the_same_fingerprint(folder, tmp_path):
    copy = tmp_path / "elsewhere" / "release"
    shutil.copytree(folder, copy)
    for file in copy.iterdir():
        os.utime(file, (1, 1))
    assert digest(copy) == digest(folder)


def test_the_same_content_saved_again_has_the_same_fingerprint(folder, tmp_path):
    again = write_checkpoint(tmp_path / "again", {"w": WEIGHTS}, num_files=1)
    assert (again / ".metadata").read_bytes() != (folder / ".metadata").read_bytes()
    assert digest(again) == digest(folder)


def test_retrained_weights_have_another_fingerprint(folder, tmp_path):
    retrained = write_checkpoint(tmp_path / "b", {"w": WEIGHTS * 1.000001}, num_files=1)
    assert digest(retrained) != digest(folder)


def test_other_chunks_have_another_fingerprint(folder, tmp_path):
    other = write_checkpoint(tmp_path / "b", {"w": WEIGHTS}, {"w": (2, 1)}, num_files=1)
    assert digest(other) != digest(folder)


@pytest.mark.parametrize("changed", [{"v": WEIGHTS}, {"w": WEIGHTS.T}, {"w": WEIGHTS.int()}])
def test_another_name_shape_or_dtype_has_another_fingerprint(changed, folder, tmp_path):
    other = write_checkpoint(tmp_path / "b", changed, num_files=1)
    assert digest(other) != digest(folder)


def flip(path, position):
    with path.open("r+b") as file:
        file.seek(position, os.SEEK_SET if position >= 0 else os.SEEK_END)
        (value,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([value ^ 1]))


@pytest.fixture
def few_blocks(monkeypatch):
    monkeypatch.setattr(module, "NUM_BLOCKS", FEW_BLOCKS)


def weights_in_the_file(folder):
    (chunk,) = read_index(folder).tensors["w"].chunks
    return folder / chunk.file, chunk.file_offset, chunk.length


@pytest.mark.parametrize("block", range(FEW_BLOCKS))
def test_the_first_the_last_and_evenly_spaced_blocks_are_sampled(block, folder, few_blocks):
    before = digest(folder)
    path, first, length = weights_in_the_file(folder)
    start = first + (length - BLOCK_BYTES) * block // (FEW_BLOCKS - 1)
    for position in (start, start + BLOCK_BYTES - 1):
        flip(path, position)
        assert digest(folder) != before
        flip(path, position)
    assert digest(folder) == before


def test_between_the_blocks_nothing_is_read(folder, few_blocks):
    before = digest(folder)
    path, first, _ = weights_in_the_file(folder)
    flip(path, first + BLOCK_BYTES + 10)
    assert digest(folder) == before


def test_a_block_reaches_over_small_chunks(tmp_path, few_blocks):
    # 240 chunks of 10 kB: every block covers several, and the last byte of the last is covered.
    folder = write_checkpoint(tmp_path, {"w": WEIGHTS}, {"w": (240, 1)}, num_files=1)
    before = digest(folder)
    chunks = sorted(read_index(folder).tensors["w"].chunks, key=lambda chunk: chunk.offsets)
    for chunk, position in ((chunks[1], 0), (chunks[-1], chunks[-1].length - 1)):
        flip(folder / chunk.file, chunk.file_offset + position)
        assert digest(folder) != before
        flip(folder / chunk.file, chunk.file_offset + position)


def test_a_small_model_is_read_whole(folder):
    before = digest(folder)
    path, first, length = weights_in_the_file(folder)
    for position in range(0, length, 200_000):
        flip(path, first + position)
        assert digest(folder) != before
        flip(path, first + position)


def test_what_lies_beside_the_model_does_not_enter(folder, tmp_path):
    beside = {"w": WEIGHTS, "optimizer.state.exp_avg.w": WEIGHTS * 2}
    other = write_checkpoint(tmp_path / "b", beside, objects={"rng_state/shard_0_1": b"dice"})
    assert digest(other) == digest(folder)


def test_a_file_that_ends_too_early_is_named(folder):
    path, first, length = weights_in_the_file(folder)
    os.truncate(path, first + length - 1)
    with pytest.raises(CheckpointError, match=r"__0_0.distcp is cut off"):
        digest(folder)


def test_a_missing_file_is_named(folder):
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match="__0_0.distcp cannot be read"):
        digest(folder)
