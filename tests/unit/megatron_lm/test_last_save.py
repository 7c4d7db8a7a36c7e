from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_mergemix.checkpoint.saves import TRACKER, resolve
from megatron_mergemix.megatron_lm.last_save import has_save
from tests.support.torch_dist import write_checkpoint


def root_with(folder: Path, *steps: int) -> Path:
    for step in steps:
        write_checkpoint(folder / f"iter_{step:07d}", {"weight": torch.ones(2)})
    return folder


def test_without_a_complete_save_there_is_nothing_to_continue_from(tmp_path: Path) -> None:
    assert not has_save(tmp_path / "none")
    root = root_with(tmp_path, 3)
    (root / "iter_0000003" / "metadata.json").unlink()
    (root / TRACKER).write_text("3")
    assert not has_save(root)
    (root / "iter_0000003" / "metadata.json").write_text("")  # torn by a kill
    assert not has_save(root)


def test_the_save_that_megatron_lm_names_is_left_alone(tmp_path: Path) -> None:
    root = root_with(tmp_path, 3, 6)
    (root / TRACKER).write_text("3")
    assert has_save(root)
    assert (root / TRACKER).read_text() == "3"


@pytest.mark.parametrize("torn", [None, "", "9"])
def test_where_no_complete_save_is_named_it_is_the_newest(tmp_path: Path, torn: str | None) -> None:
    root = root_with(tmp_path, 3, 6)
    if torn is not None:
        (root / TRACKER).write_text(torn)
    assert has_save(root)
    assert resolve(root) == root / "iter_0000006"
