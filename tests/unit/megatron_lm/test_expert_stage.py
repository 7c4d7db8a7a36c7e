"""What a run of the stages expert and reference is refused for, before anything is built."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_mergemix.errors import SearchError
from megatron_mergemix.megatron_lm import expert_stage
from megatron_mergemix.megatron_lm.expert_stage import ExpertStage
from tests.unit.megatron_lm.test_launched_model import launch
from tests.unit.megatron_lm.test_mixture_flag import config


class Goes(Exception):
    """Said in place of what comes next."""


def goes_on(*_: Any) -> Any:
    raise Goes


def another_search(*_: Any) -> Any:
    raise SearchError("there is no learned mixture for these settings yet.")


@pytest.mark.parametrize(
    ("name", "is_rank_0", "error"),
    [
        ("references/best", True, SearchError),
        ("references/best", False, Goes),  # rank 0 fails for all
        ("references/even", True, Goes),
        ("experts/math", True, Goes),
    ],
)
def test_a_mixture_that_another_search_has_learned_is_not_trained(
    monkeypatch: pytest.MonkeyPatch, name: str, is_rank_0: bool, error: type[Exception]
) -> None:
    monkeypatch.setattr(expert_stage, "finished_search", another_search)
    monkeypatch.setattr(expert_stage, "requested_run", goes_on)
    monkeypatch.setattr(expert_stage, "is_rank_0", lambda: is_rank_0)
    references = {"references": {"best": "learned", "even": "uniform"}}
    stage = ExpertStage(config().model_copy(update=references), name, "reference")
    with pytest.raises(error):
        stage.before_validation(launch())
