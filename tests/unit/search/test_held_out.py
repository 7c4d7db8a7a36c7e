"""What is left of a gain on other items, and what is said of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_mergemix.config import evaluate as config_evaluate
from megatron_mergemix.evaluate.utility import Scale, Utility, objective_of
from megatron_mergemix.search.held_out import compared, comparison, notes
from megatron_mergemix.search.strategy import Recommendation
from megatron_mergemix.trials import Score, Scores, Trial

EVALUATE = config_evaluate.Evaluate(
    capabilities={
        "web": config_evaluate.Capability(
            loss=config_evaluate.LossTask(prefixes=["a"], sequences=8)
        ),
        "own": config_evaluate.Capability(
            command=config_evaluate.CommandTask(run=["x"], metrics=["m"])
        ),
    }
)
UTILITY = Utility(config_evaluate.Utility(normalize="none"), objective_of(EVALUATE))
SCALE = Scale(np.zeros(2), np.ones(2))


def web(*items: float) -> dict[str, Score]:
    stderr = float(np.std(items, ddof=1) / np.sqrt(len(items)))
    return {"loss": Score(float(np.mean(items)), stderr, len(items), "nats/token", False, items)}


def scores(*items: float, own: float = 0.5) -> Scores:
    return {"web": web(*items), "own": {"m": Score(own, None, 1, "", True)}}


def trial(index: int, mixture: dict[str, float], measured: Scores) -> Trial:
    return Trial(index, "vertex", mixture, {"a": 1.0}, measured)


TRIALS = [
    trial(0, {}, scores(3.0, 3.5, 4.0)),
    trial(1, {"a": 0.5}, scores(2.0, 2.5, 3.0)),
    trial(2, {"a": 1.0}, scores(1.0, 1.5, 2.1)),
]
ADVICE = Recommendation(
    mixture={"a": 1.0},
    source="argmax",
    utility=0.0,
    utility_stderr=None,
    alternatives={
        "argmax": {"trial": 2},
        "best observed": {"trial": 2},
        "uniform": {"trial": 1},
    },
    interval=(-0.1, 0.1),
    better_than={},
    as_good={},
    items="new items",
)


def report(**held: Scores) -> dict[str, Any]:
    by_index = {int(name[1:]): value for name, value in held.items()}
    return comparison(EVALUATE, UTILITY, SCALE, compared(ADVICE, TRIALS), by_index)


def test_the_recommended_is_compared_with_all_others_that_were_measured() -> None:
    found = compared(ADVICE, TRIALS)
    assert {name: each.index for name, each in found.items()} == {
        "recommended": 2,
        "uniform": 1,
        "base": 0,
    }


def test_a_capability_with_a_task_that_has_no_item_to_hold_out_is_taken_from_the_search() -> None:
    tasks = Utility(config_evaluate.Utility(normalize="none"), {"web": ["loss", "tiny"]})
    tiny = {"tiny": Score(1.0, None, 1, "nats/token", False)}
    trials = [
        Trial(t.index, "vertex", t.mixture, {}, {"web": {**t.scores["web"], **tiny}})
        for t in TRIALS
    ]
    found = comparison(
        EVALUATE, tasks, SCALE, compared(ADVICE, trials), {2: {"web": web(1, 2)}, 1: {}}
    )
    assert found["items"] == {}
    assert "web" in found["as_searched"]
    assert "models" not in found


def test_gains_are_on_both_kinds_of_items_and_paired() -> None:
    found = report(t0={"web": web(3, 4)}, t1={"web": web(2, 3)}, t2={"web": web(1, 2.5)})
    row = found["models"]["uniform"]
    assert row["gain_searched"] == pytest.approx((7.5 - 4.6) / 3 / 2)
    assert row["gain_held_out"] == pytest.approx(0.75 / 2)
    assert row["held_out"] == pytest.approx((-2.5 + 0.5) / 2)
    assert found["items"] == {"web": 2}
    assert found["as_searched"] == {"own": "what a command scores cannot be split"}
    assert "gain_held_out" not in found["models"]["recommended"]
    # The error of the command is unknown, so that of the gain is.
    assert row["gain_held_out_stderr"] is None
    alone = Utility(
        config_evaluate.Utility(normalize="none", weights={"web": 1, "own": 0}),
        objective_of(EVALUATE),
    )
    held = {1: {"web": web(2, 3)}, 2: {"web": web(1, 2.5)}}
    both = comparison(EVALUATE, alone, SCALE, compared(ADVICE, TRIALS), held)
    stderr = float(np.std([1, 0.5], ddof=1) / np.sqrt(2))
    assert both["models"]["uniform"]["gain_held_out_stderr"] == pytest.approx(stderr)


def test_a_gain_that_does_not_survive_is_said() -> None:
    kept = report(t1={"web": web(2, 3)}, t2={"web": web(1, 2.5)})
    assert not any("does not survive" in note for note in notes(EVALUATE, kept))
    lost = report(t1={"web": web(2, 3)}, t2={"web": web(2.1, 3)})
    (note,) = [note for note in notes(EVALUATE, lost) if "does not survive" in note]
    assert note.startswith("The gain over uniform does not survive on items that the search never")


def test_a_gain_that_shrinks_beyond_chance_is_said() -> None:
    row = {"trial": 1, "gain_searched": 0.5, "gain_held_out": 0.2}
    for error, is_said in ((0.05, True), (0.2, False)):
        errors = {"gain_searched_stderr": error, "gain_held_out_stderr": error}
        found = {"items": {}, "as_searched": {}, "models": {"base": {**row, **errors}}}
        assert any("does not survive" in n for n in notes(EVALUATE, found)) == is_said


@pytest.mark.parametrize(("held_out", "is_said"), [(0.2, True), (0.3, False)])
def test_a_gain_of_unknown_error_counts_as_lost_when_it_is_halved(
    held_out: float, is_said: bool
) -> None:
    row = {"trial": 1, "gain_searched": 0.5, "gain_held_out": held_out}
    errors = {"gain_searched_stderr": 0.05, "gain_held_out_stderr": None}
    found = {"items": {}, "as_searched": {}, "models": {"base": {**row, **errors}}}
    assert any("does not survive" in n for n in notes(EVALUATE, found)) == is_said


def test_too_few_items_and_none_at_all_are_said() -> None:
    few = report(t1={"web": web(2.0, 3.0)}, t2={"web": web(1.0, 2.5)})
    assert notes(EVALUATE, few)[0].startswith("The comparison"), "2 of 8 / 0.8 * 0.2 are all"
    one = {n: Score(2.0, None, 1, "nats/token", False, (2.0,)) for n in ("loss",)}
    assert notes(EVALUATE, report(t1={"web": one}, t2={"web": one}))[0].startswith(
        "Of the held-out items, capability web has 1, where evaluate.held_out 0.2 asks for 2"
    )
    none = report(t1={}, t2={})
    assert "models" not in none
    assert notes(EVALUATE, none)[0].startswith("The mixture was not checked on held-out items: web")


def test_a_winner_that_could_not_be_scored_again_is_not_compared() -> None:
    assert "models" not in report(t1={"web": web(2, 3)})
