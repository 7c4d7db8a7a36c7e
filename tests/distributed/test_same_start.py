"""All ranks of a run that is trained begin at the base, or all at its last save."""

from __future__ import annotations

from tests.support.run_distributed import run_distributed


def starts() -> list[str]:
    from megatron_mergemix.errors import CheckpointError
    from megatron_mergemix.megatron_lm.last_save import check_same_start
    from megatron_mergemix.processes.distributed import rank

    said = []
    for resumes in (True, False, rank() == 0, rank() == 1):
        try:
            check_same_start(resumes)
            said.append("same")
        except CheckpointError as error:
            said.append(str(error).partition(":")[0])
    return said


def test_a_save_that_some_ranks_do_not_see_is_an_error_on_all() -> None:
    apart = "some ranks see a save to continue from, others see none and would begin at the base"
    assert run_distributed(starts, 2) == [["same", "same", apart, apart]] * 2
