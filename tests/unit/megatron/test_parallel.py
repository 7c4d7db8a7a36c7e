"""What keeps ranks from being started, before any process group exists."""

from __future__ import annotations

import pytest
import torch

from megatron_mergemix.config import Parallel
from megatron_mergemix.errors import MergeMixError
from megatron_mergemix.megatron import cpu_mode, parallel


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the list of devices that were chosen."""
    chosen: list[int] = []
    monkeypatch.setattr(cpu_mode, "wanted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_a_rank_without_a_gpu_of_its_own_is_refused(
    two_gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(MergeMixError, match="LOCAL_RANK is 2, but this machine shows 2 CUDA dev"):
        parallel.start(Parallel(processes=3))
    assert two_gpus == []


def test_repairs_are_applied_outside_cpu_mode_too(
    two_gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Applied(Exception):
        pass

    def apply() -> None:
        raise Applied

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(parallel.repairs, "apply", apply)
    with pytest.raises(Applied):
        parallel.start(Parallel(processes=2))
    assert two_gpus == [1]
