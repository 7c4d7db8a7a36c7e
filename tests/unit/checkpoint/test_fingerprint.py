from __future__ import annotations

import os
import shutil

import pytest
import torch

from megatron_mergemix.checkpoint.fingerprint import BLOCK_BYTES, BLOCKS_PER_FILE, fingerprint
from megatron_mergemix.checkpoint.metadata import read_index
from megatron_mergemix.errors import CheckpointError
from tests.support.torch_dist import write_checkpoint

WEIGHTS = torch.arange(600_000.0).reshape(600, 1000)  # 2.4 MB: more than is sampled of a file


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


@pytest.mark.parametrize("block", range(BLOCKS_PER_FILE))
def test_the_first_the_last_and_evenly_spaced_blocks_are_sampled(block, folder):
    before = digest(folder)
    path = folder / "__0_0.distcp"
    start = (path.stat().st_size - BLOCK_BYTES) * block // (BLOCKS_PER_FILE - 1)
    for position in (start, start + BLOCK_BYTES - 1):
        flip(path, position)
        assert digest(folder) != before
        flip(path, position)
    assert digest(folder) == before


def test_between_the_blocks_nothing_is_read(folder):
    before = digest(folder)
    flip(folder / "__0_0.distcp", BLOCK_BYTES + 10)
    assert digest(folder) == before


def test_a_small_file_is_read_whole(tmp_path):
    folder = write_checkpoint(tmp_path, {"w": WEIGHTS[:100]}, num_files=1)
    before = digest(folder)
    flip(folder / "__0_0.distcp", 200_000)
    assert digest(folder) != before


def test_a_longer_file_has_another_fingerprint(folder):
    before = digest(folder)
    with (folder / "__0_0.distcp").open("ab") as file:
        file.write(b"\0")
    assert digest(folder) != before


def test_a_missing_file_is_named(folder):
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match="__0_0.distcp cannot be read"):
        digest(folder)
