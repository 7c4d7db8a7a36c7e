"""Scores on a first share, as what they would be on all items."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_mergemix.search.first_share import on_all_items
from megatron_mergemix.trials import Score, Trial

ALL, FIRST = 40, 10


def items_of(level: float, seed: int = 0, offset: float = 0.0, noise: float = 0.0) -> list[float]:
    """Return items whose others are higher than the first ones by ``offset``."""
    luck = noise * np.random.default_rng(seed).normal(size=ALL)
    return [level + luck[place] + offset * (place >= FIRST) for place in range(ALL)]


def score(items: list[float], keep: bool = True) -> Score:
    error = float(np.std(items, ddof=1)) / len(items) ** 0.5
    kept = tuple(items) if keep else ()
    return Score(float(np.mean(items)), error, len(items), "accuracy", True, kept)


def trial(index: int, items: list[float], first: bool = False, **more) -> Trial:
    share = index / 100
    mixture = {"a": share, "b": 1 - share}
    found = score(items[:FIRST] if first else items, more.pop("keep", True))
    scores = {"web": {"acc": found}}
    return Trial(index, "fill", mixture, mixture, scores, first=0.25 if first else None, **more)


def value(found: Trial) -> float:
    return found.scores["web"]["acc"].value


def test_nothing_changes_where_all_trials_are_on_all_items() -> None:
    trials = [trial(1, items_of(0.5)), replace(trial(2, items_of(0.5)), error="broken")]
    assert on_all_items(trials) == trials


def test_a_score_is_moved_by_how_much_the_first_items_differ_for_the_others() -> None:
    whole = [trial(n, items_of(0.1 * n, n, offset=0.2)) for n in (1, 2, 3)]
    (found,) = on_all_items([*whole, trial(4, items_of(0.4, offset=0.2), first=True)])[3:]
    assert value(found) == pytest.approx(0.4 + 0.75 * 0.2)
    assert found.first == 0.25
    assert found.scores["web"]["acc"].items == ()


def test_the_error_stays_that_of_the_few_items() -> None:
    whole = [trial(n, items_of(0.1 * n, n, 0.2, 0.1)) for n in (1, 2, 3)]
    partial = trial(4, items_of(0.4, 4, 0.2, 0.1), first=True)
    (found,) = on_all_items([*whole, partial])[3:]
    assert found.scores["web"]["acc"].stderr == partial.scores["web"]["acc"].stderr


def test_a_difference_that_may_be_chance_is_not_believed() -> None:
    whole = [trial(n, items_of(0.5, n, 0.0, 0.3)) for n in (1, 2, 4)]
    differences = [value(each) - np.mean(each.scores["web"]["acc"].items[:FIRST]) for each in whole]
    assert 0 < abs(np.mean(differences)) < np.std(differences, ddof=1) / 3**0.5
    partial = trial(9, items_of(0.5, 9, 0.0, 0.3), first=True)
    assert value(on_all_items([*whole, partial])[3]) == value(partial)


def test_a_candidate_that_has_both_is_the_later_trial_with_the_first_purpose() -> None:
    items = items_of(0.3, 1, 0.1, 0.1)
    begun = trial(1, items, first=True)
    raced = replace(trial(1, items), index=7, purpose="race:1")
    assert on_all_items([begun, raced]) == [replace(raced, purpose="fill")]


def test_without_items_the_pairs_of_both_trials_tell_the_difference() -> None:
    trials = []
    for n in (1, 2, 3):
        items = items_of(0.1 * n, n, offset=0.2)
        begun = trial(n, items, first=True, keep=False)
        raced = replace(trial(n, items, keep=False), index=10 + n, purpose="race:1")
        trials += [begun, raced]
    found = on_all_items([*trials, trial(4, items_of(0.4), first=True, keep=False)])
    assert [each.index for each in found] == [11, 12, 13, 4]
    assert value(found[3]) == pytest.approx(0.4 + 0.75 * 0.2)


def test_what_a_command_scored_is_on_all_already() -> None:
    number = {"tests": {"pass": Score(0.7, None, 1, "", True)}}
    whole = replace(trial(1, items_of(0.5)), scores=number)
    partial = replace(trial(2, items_of(0.5), first=True), scores=number)
    assert on_all_items([whole, partial])[1].scores == number


def test_doing_it_again_changes_nothing_and_failures_are_left_out() -> None:
    whole = [trial(n, items_of(0.1 * n, n, 0.2, 0.1)) for n in (1, 2, 3)]
    failed = replace(trial(5, items_of(0.4), first=True), scores={}, error="broken")
    once = on_all_items([*whole, failed, trial(4, items_of(0.4), first=True)])
    assert [each.index for each in once] == [1, 2, 3, 4]
    assert on_all_items(once) == once
