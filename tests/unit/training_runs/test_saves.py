"""Which saves of a run make its result."""

from __future__ import annotations

import pytest

from megatron_mergemix.errors import ConfigError
from megatron_mergemix.training_runs.saves import averaged_steps


@pytest.mark.parametrize(
    ("save_interval", "average_last", "expected"),
    [
        (4, 3, (4, 8, 10)),
        (5, 2, (5, 10)),
        (500, 1, (10,)),
        (0, 1, (10,)),
        (1, None, (7, 8, 9, 10)),
        (3, None, (9, 10)),
        (6, None, (10,)),
        (500, None, (10,)),
    ],
)
def test_a_result_is_the_mean_of_planned_saves_of_which_the_very_last_is_one(
    save_interval: int, average_last: int | None, expected: tuple[int, ...]
) -> None:
    assert averaged_steps(10, save_interval, average_last) == expected


def test_exactly_two_thirds_of_the_steps_are_not_in_the_last_third() -> None:
    assert averaged_steps(9, 3, None) == (9,)
    assert averaged_steps(9, 1, None) == (7, 8, 9)


def test_more_saves_than_a_run_makes_are_refused() -> None:
    with pytest.raises(ConfigError, match="is 3, but 10 steps with a save every 5 make 2 saves"):
        averaged_steps(10, 5, 3)
