"""Ranks wait for one another's word longer than a collective may take."""

from __future__ import annotations

from pathlib import Path

from tests.support.run_distributed import run_distributed

SHORT, LONG = 1.5, 4.0
"""Seconds: what a collective may take, and what rank 0 takes."""


def words_of_a_slow_rank_0(store: Path) -> tuple[str, str]:
    """Return what rank 0 says after a while, and what becomes of its error; twice over."""
    import time
    from datetime import timedelta

    import torch.distributed as dist

    from megatron_mergemix.errors import MergeMixError
    from megatron_mergemix.processes.distributed import from_all, from_rank_0, rank, together

    own, size = dist.get_rank(), dist.get_world_size()
    assert from_all(own) == [0, 1]
    dist.destroy_process_group()  # another group of all ranks wants words of its own
    dist.init_process_group(
        *("gloo", f"file://{store}"), timedelta(seconds=SHORT), rank=own, world_size=size
    )

    def slowly() -> str:
        time.sleep(LONG)
        return f"rank {rank()}"

    said = from_rank_0(slowly)
    try:
        with together():
            if rank() == 0:
                time.sleep(LONG)
                raise ValueError("too late")
    except (MergeMixError, ValueError) as error:
        return said, str(error)
    return said, "no error"


def test_the_word_of_a_rank_may_take_longer_than_a_collective(tmp_path: Path) -> None:
    first, second = run_distributed(words_of_a_slow_rank_0, 2, tmp_path / "store")
    assert first == ("rank 0", "too late")
    assert second == ("rank 0", "rank 0: ValueError: too late")
