"""What fixes the scale of the utility, and what is said of a scale that noise has fixed."""

from __future__ import annotations

import numpy as np

from megatron_mergemix.config import evaluate as config_evaluate
from megatron_mergemix.evaluate.utility import Scale, Utility
from megatron_mergemix.search.calibration import notes_on_scale
from megatron_mergemix.search.stage import OnOneScale
from megatron_mergemix.trials import Score, Trial

DOMAINS = ("web", "code", "math")


def utility(normalize: str = "vertices", **weights: float) -> Utility:
    settings = config_evaluate.Utility(normalize=normalize, weights=weights)  # type: ignore[arg-type]
    return Utility(settings, {"quiz": ["acc"], "sums": ["acc"]})


def accuracy(value: float, items: tuple[float, ...] = ()) -> Score:
    return Score(value, 0.02, 300, "accuracy", True, items)


def vertices(quiz: tuple[float, ...], sums: tuple[float, ...], failed: str = "") -> list[Trial]:
    return [
        Trial(
            index,
            "vertex",
            {name: float(name == domain) for name in DOMAINS},
            {},
            {}
            if domain == failed
            else {"quiz": {"acc": accuracy(a)}, "sums": {"acc": accuracy(b)}},
            error="out of memory" if domain == failed else None,
        )
        for index, (domain, a, b) in enumerate(zip(DOMAINS, quiz, sums, strict=True), start=1)
    ]


CLEAR, NOISE = (0.2, 0.5, 0.3), (0.20, 0.21, 0.205)


def test_nothing_is_said_of_a_scale_that_measurements_tell() -> None:
    assert notes_on_scale(utility(), vertices(CLEAR, CLEAR)) == []


def test_a_unit_of_noise_is_told_with_its_size_and_what_to_do() -> None:
    (note,) = notes_on_scale(utility(), vertices(CLEAR, NOISE))
    assert "The unit of sums is 0.01, by how much domains alone differ in it, which is 0.4" in note
    assert "or the weight 0, or use evaluate.utility.normalize: none." in note


def test_a_capability_without_weight_and_another_scale_are_of_no_matter() -> None:
    trials = vertices(CLEAR, NOISE)
    assert notes_on_scale(utility(quiz=1.0, sums=0.0), trials) == []
    assert notes_on_scale(utility("none"), trials) == []


def test_a_difference_is_paired_over_items_where_both_have_theirs() -> None:
    """A hundredth more on every one of many hard and easy items is more than chance."""
    items = tuple(0.1 + 0.8 * (number % 2) for number in range(300))
    more = tuple(item + 0.01 + 1e-4 * (number % 3) for number, item in enumerate(items))
    trials = vertices(CLEAR, NOISE)
    for trial, values in zip(trials, (items, more, items), strict=True):
        trial.scores["sums"]["acc"] = accuracy(sum(values) / len(values), values)  # type: ignore[index]
    assert notes_on_scale(utility(), trials) == []


def test_a_domain_alone_that_could_not_be_scored_is_named() -> None:
    (note,) = notes_on_scale(utility(), vertices(CLEAR, CLEAR, failed="web"))
    assert note.startswith("A domain alone could not be scored (trials 1), so what 0 and 1 of")
    partial = Trial(9, "fill", {"web": 0.5, "code": 0.5}, {}, {}, first=0.25)
    assert notes_on_scale(utility(), [*vertices(CLEAR, CLEAR, failed="web"), partial]) == [note]


def test_a_scale_from_elsewhere_is_not_judged_by_these_trials() -> None:
    given = OnOneScale(utility(), Scale(np.zeros(2), np.ones(2)))
    assert notes_on_scale(given, vertices(CLEAR, NOISE)) == []
