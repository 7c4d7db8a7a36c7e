"""fp32 master weights that ``pretrain_gpt.py`` saved beside bf16 weights, merged.

The oracle is float64 arithmetic on what Megatron's own loader reads.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_mergemix.checkpoint.metadata import read_index
from megatron_mergemix.checkpoint.reader import CheckpointReader
from megatron_mergemix.cli import main
from tests.integration.test_merge_in_megatron_lm import MODEL
from tests.support.megatron_lm import each_checkout, run_pretrain_gpt
from tests.support.run_distributed import run_command

pytestmark = pytest.mark.nightly

SAVES = ("--train-iters", "3", "--eval-interval", "9", "--save-interval", "1")
MASTERS = ("--bf16", "--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")
LOADER = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
from megatron.core import dist_checkpointing
prefix, found = "optimizer.state.param.", []
for folder in sys.argv[3:]:
    plain = dist_checkpointing.load_plain_tensors(folder)
    found.append({k[len(prefix):]: v for k, v in plain.items() if k.startswith(prefix)})
torch.save(found, sys.argv[2])
"""


def masters(checkout: Path, folders: Sequence[Path], kept: Path) -> list[dict[str, torch.Tensor]]:
    """Return the master weights of saves as Megatron loads them, in float64."""
    words = map(str, (checkout, kept, *folders))
    done = run_command([sys.executable, "-c", LOADER, *words])
    assert done.returncode == 0, done.stdout
    found = torch.load(kept)
    assert {tensor.dtype for save in found for tensor in save.values()} == {torch.float32}
    return [{name: tensor.double() for name, tensor in save.items()} for save in found]


@each_checkout()
def test_a_merge_of_master_weights_is_rounded_once(checkout: Path, tmp_path: Path) -> None:
    """One run gives base and experts: its first save and the two after it."""
    root = tmp_path / "run"
    done = run_pretrain_gpt(checkout, 2, [*MODEL, *SAVES, *MASTERS, "--save", str(root)])
    assert done.returncode == 0, done.stdout
    folders = [root / f"iter_{step:07d}" for step in (1, 2, 3)]
    arguments = ["merge", "--base", str(folders[0]), "--method", "task_arithmetic"]
    arguments += [f"--expert={folders[1]}=0.7", f"--expert={folders[2]}=-0.4"]
    assert main([*arguments, "--from-master-weights", f"--output={tmp_path / 'masters'}"]) == 0
    assert main([*arguments, f"--output={tmp_path / 'weights'}"]) == 0

    base, first, second = masters(checkout, folders, tmp_path / "masters.pt")
    readers = {
        what: CheckpointReader(read_index(tmp_path / what / "release"))
        for what in ("masters", "weights")
    }
    index = readers["masters"].index
    assert index.model_tensors().keys() == index.tensors.keys() == base.keys()
    right: dict[str, list[np.ndarray]] = {"masters": [], "weights": []}
    for name in base:
        exact = base[name] + 0.7 * (first[name] - base[name]) - 0.4 * (second[name] - base[name])
        for what, reader in readers.items():
            merged = reader.read(name)
            assert merged.dtype == torch.bfloat16
            right[what].append((merged == exact.bfloat16()).numpy().ravel())
            torch.testing.assert_close(merged.double(), exact, rtol=2**-6, atol=2e-4)
    shares = {what: np.concatenate(found).mean() for what, found in right.items()}
    assert shares["masters"] > 0.9995, "but for ties that float32 decides otherwise"
    assert shares["weights"] < 0.9, "the masters hold more than the weights"
