"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_mergemix.errors import MergeMixError
from megatron_mergemix.files import publishing as module
from megatron_mergemix.files.publishing import publish_json, publish_text
from megatron_mergemix.run_dir import RunDir


def test_published_text_is_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    publish_text(path, "one\n")
    publish_text(path, "zwei \u00fc\n")
    assert path.read_bytes() == b"zwei \xc3\xbc\n"
    assert os.listdir(path.parent) == ["file.txt"]


def test_a_failed_publish_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    publish_json(path, {"a": 0.1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        publish_json(path, {"a": float("nan")})
    with pytest.raises(UnicodeEncodeError):
        publish_text(path, "\ud800")
    assert json.loads(path.read_text()) == {"a": 0.1}
    assert os.listdir(tmp_path) == ["result.json"]


def test_publish_syncs_the_file_before_and_the_folder_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(file: int) -> None:
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{file}") else "file")
        fsync(file)

    def watched_replace(old: Path, new: Path) -> None:
        events.append("rename")
        replace(old, new)

    monkeypatch.setattr(module.os, "fsync", watched_fsync)
    monkeypatch.setattr(module.os, "replace", watched_replace)
    publish_text(tmp_path / "a", "x")
    assert events == ["file", "rename", "folder"]


def test_a_refusing_file_system_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file, not a folder")
    with pytest.raises(MergeMixError, match=r"cannot write .*a.json: .*run must be writable"):
        publish_json(tmp_path / "run" / "a.json", {})
    with (
        pytest.raises(MergeMixError, match=r"cannot write .*run.lock: .*must be writable"),
        RunDir(tmp_path / "run").lock("run"),
    ):
        pass


# A child that takes the lock, says so, and waits to be killed.
