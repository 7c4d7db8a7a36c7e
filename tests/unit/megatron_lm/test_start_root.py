from __future__ import annotations

from pathlib import Path

from megatron_mergemix.checkpoint.saves import resolve
from megatron_mergemix.megatron_lm.start_root import start_root
from tests.support.torch_dist import write_checkpoint


def save(folder: Path) -> Path:
    import torch

    write_checkpoint(folder, {"weight": torch.ones(2)})
    return folder


def test_the_root_leads_to_the_given_save_and_no_other(tmp_path: Path) -> None:
    early, late = (save(tmp_path / "base" / f"iter_{step:07d}") for step in (10, 20))
    (tmp_path / "base" / "latest_checkpointed_iteration.txt").write_text("20")
    root = start_root(tmp_path / "start", early)
    assert resolve(root).resolve() == early
    assert start_root(tmp_path / "start", late) == root
    assert resolve(root).resolve() == late
    assert sorted(path.name for path in root.iterdir()) == [
        "latest_checkpointed_iteration.txt",
        "release",
    ]
