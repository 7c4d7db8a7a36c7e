from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.processes import is_dead
from tests.support.run_distributed import RankFailure, run_command, run_distributed

pytestmark = pytest.mark.nightly


def sum_over_ranks(offset: int) -> tuple[int, list[float]]:
    import torch
    import torch.distributed as dist

    total = torch.ones(2) * (dist.get_rank() + offset)
    dist.all_reduce(total)
    return dist.get_rank(), total.tolist()


def fail_on_rank_one() -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise ValueError("the reason")
    dist.barrier()


def leave_a_child_and_hang(folder: Path) -> None:
    child = subprocess.Popen(["sleep", "100"])
    (folder / f"child-{os.environ['RANK']}").write_text(str(child.pid))
    time.sleep(100)


def test_every_rank_returns_its_result_in_order() -> None:
    assert run_distributed(sum_over_ranks, 2, 1) == [(0, [3.0, 3.0]), (1, [3.0, 3.0])]


def test_a_failure_shows_the_rank_and_its_traceback() -> None:
    with pytest.raises(RankFailure, match=r"(?s)Rank 1 ended.*ValueError: the reason"):
        run_distributed(fail_on_rank_one, 2)


def test_a_timeout_kills_the_ranks_and_their_children(tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match="no end after 8"):
        run_distributed(leave_a_child_and_hang, 1, tmp_path, timeout=8.0)
    assert is_dead(int((tmp_path / "child-0").read_text()))


def test_a_command_that_takes_too_long_shows_what_it_wrote() -> None:
    code = "import time; print('so far', flush=True); time.sleep(100)"
    with pytest.raises(RankFailure, match="so far"):
        run_command([sys.executable, "-c", code], timeout=3.0)
