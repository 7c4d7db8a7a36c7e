from __future__ import annotations

import json
import shutil

import pytest
import torch

from megatron_mergemix.checkpoint.saves import TRACKER, complete_saves, resolve
from megatron_mergemix.errors import CheckpointError
from tests.support.torch_dist import write_checkpoint


def save(root, iteration, name="decoder.weight"):
    return write_checkpoint(root / f"iter_{iteration:07d}", {name: torch.ones(3)})


def track(root, text):
    (root / TRACKER).write_text(text)


def test_a_root_resolves_to_the_save_that_its_tracker_names(tmp_path):
    for iteration in (3, 10):
        save(tmp_path, iteration)
    track(tmp_path, "3\n")
    assert resolve(tmp_path) == tmp_path / "iter_0000003"


def test_the_tracker_may_say_release(tmp_path):
    save(tmp_path, 3).rename(tmp_path / "release")
    track(tmp_path, "release")
    assert resolve(tmp_path) == tmp_path / "release"


def test_an_iteration_folder_resolves_to_itself(tmp_path):
    folder = save(tmp_path, 3)
    track(tmp_path, "10")
    assert resolve(folder) == folder


def test_complete_saves_are_in_order_of_iteration_and_without_broken_ones(tmp_path):
    for iteration in (10, 9, 123456789, 2):
        save(tmp_path, iteration)
    (tmp_path / "iter_0000010" / "metadata.json").unlink()
    (tmp_path / "iter_0000011").mkdir()
    (tmp_path / "iter_x").mkdir()
    (tmp_path / "iter_0000012").touch()
    assert [(i, folder.name) for i, folder in complete_saves(tmp_path)] == [
        (2, "iter_0000002"),
        (9, "iter_0000009"),
        (123456789, "iter_123456789"),
    ]


def test_no_saves_are_no_error_but_no_root_is(tmp_path):
    assert complete_saves(tmp_path) == []
    with pytest.raises(CheckpointError, match="absent is not a folder"):
        complete_saves(tmp_path / "absent")


def message(path):
    with pytest.raises(CheckpointError) as error:
        resolve(path)
    return str(error.value)


def test_a_path_that_does_not_exist_is_named(tmp_path):
    assert f"{tmp_path / 'nowhere'} does not exist" in message(tmp_path / "nowhere")


def test_a_file_is_not_a_checkpoint(tmp_path):
    (tmp_path / "file").touch()
    assert f"{tmp_path / 'file'} is not a folder" in message(tmp_path / "file")


def test_an_empty_folder_is_neither_root_nor_iteration(tmp_path):
    text = message(tmp_path)
    assert f"neither {TRACKER} nor .metadata" in text
    assert "no complete saves" in text


def test_a_root_without_tracker_lists_the_newest_saves(tmp_path):
    for iteration in range(7):
        save(tmp_path, iteration)
    assert message(tmp_path).endswith(
        "iter_0000006, iter_0000005, iter_0000004, iter_0000003, iter_0000002 and 2 more."
    )


def test_a_tracker_that_names_a_missing_folder_lists_what_is_there(tmp_path):
    save(tmp_path, 5)
    track(tmp_path, "7")
    text = message(tmp_path)
    assert "names iter_0000007, which does not exist" in text
    assert f"Complete saves in {tmp_path}: iter_0000005." in text


@pytest.mark.parametrize("text", ["", "seven", "-1", "3 4", "1e3", "\u0663", "9" * 30, "../x"])
def test_a_damaged_tracker_is_quoted(text, tmp_path):
    track(tmp_path, text)
    assert "expected an iteration or the word release" in message(tmp_path)


def test_a_save_under_way_is_called_incomplete(tmp_path):
    """Megatron writes data files, common.pt, .metadata and last metadata.json."""
    save(tmp_path, 5)
    folder = save(tmp_path, 7)
    (folder / "metadata.json").unlink()
    track(tmp_path, "7")
    for damage in (None, ".metadata", "__0_0.distcp"):
        if damage:
            (folder / damage).unlink()
        text = message(tmp_path)
        assert "iter_0000007 has no metadata.json" in text
        assert "killed or is still being written" in text
        assert "iter_0000005" in text


def test_an_incomplete_save_with_common_pt_is_called_incomplete(tmp_path):
    folder = save(tmp_path, 7)
    (folder / "metadata.json").unlink()
    (folder / ".metadata").unlink()
    for data in folder.glob("*.distcp"):
        data.unlink()
    (folder / "common.pt").touch()
    assert "has no metadata.json" in message(folder)


def test_a_copy_without_hidden_files_is_named(tmp_path):
    folder = save(tmp_path, 7)
    (folder / ".metadata").unlink()
    assert "no .metadata" in message(folder)
    assert "hidden files" in message(folder)


def test_the_legacy_format_comes_with_the_flags_that_convert_it(tmp_path):
    (tmp_path / "iter_0000002" / "mp_rank_00").mkdir(parents=True)
    track(tmp_path, "2")
    text = message(tmp_path)
    assert "legacy torch format" in text
    assert "--ckpt-convert-format torch_dist" in text


@pytest.mark.parametrize(
    ("name", "format_", "flag"),
    [
        ("model.decoder.layers.0.weight", "torch_dcp", "--use-torch-fsdp2"),
        ("model.module.decoder.layers.0.weight", "fsdp_dtensor", "--use-megatron-fsdp"),
    ],
)
def test_fsdp_formats_are_told_apart(name, format_, flag, tmp_path):
    folder = save(tmp_path, 2, name)
    (folder / "metadata.json").unlink()
    text = message(folder)
    assert f"in the {format_} format" in text
    assert flag in text


def test_zarr_comes_with_the_last_version_that_reads_it(tmp_path):
    folder = save(tmp_path, 2)
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    text = message(folder)
    assert "zarr format" in text
    assert "0.15" in text


@pytest.mark.parametrize(
    "config",
    [
        {"sharded_backend": "torch_dist", "sharded_backend_version": 2},
        {"sharded_backend": "next"},
        {},
        [],
        None,
    ],
)
def test_an_unknown_backend_is_refused(config, tmp_path):
    folder = save(tmp_path, 2)
    (folder / "metadata.json").write_text(json.dumps(config))
    assert "expected 'torch_dist', version 1" in message(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100000])
def test_a_damaged_metadata_json_is_named(content, tmp_path):
    folder = save(tmp_path, 2)
    (folder / "metadata.json").write_bytes(content)
    assert "metadata.json is damaged" in message(folder)


def test_a_root_that_was_moved_still_resolves(tmp_path):
    save(tmp_path / "a", 2)
    track(tmp_path / "a", "2")
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert resolve(tmp_path / "b") == tmp_path / "b" / "iter_0000002"
