"""By how much one trial beats another, and how sure that is."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_mergemix.config import evaluate as config_evaluate
from megatron_mergemix.evaluate.utility import Scale, Utility
from megatron_mergemix.trials import Score

SCALE = Scale(np.array([-3.0, 0.0]), np.array([2.0, 0.5]))


def utility(**settings) -> Utility:
    return Utility(config_evaluate.Utility(**settings), {"text": ["loss"], "quiz": ["accuracy"]})


def score(items, higher_is_better: bool, keep: bool = True) -> Score:
    items = tuple(float(x) for x in items)
    stderr = float(np.std(items, ddof=1) / np.sqrt(len(items)))
    unit = "accuracy" if higher_is_better else "nats/token"
    return Score(
        float(np.mean(items)), stderr, len(items), unit, higher_is_better, items if keep else ()
    )


def scores(text, quiz, keep: bool = True):
    return {
        "text": {"loss": score(text, False, keep)},
        "quiz": {"accuracy": score(quiz, True, keep)},
    }


HARD, EASY = [5.0, 1.0, 3.0, 7.0], [1.0, 0.0, 1.0, 0.0]


def test_what_makes_items_hard_for_all_candidates_does_not_blur_their_difference() -> None:
    better = scores([x - 0.5 for x in HARD], EASY)
    worse = scores(HARD, EASY)
    gain = utility().gain(better, worse, SCALE)
    assert gain.value == pytest.approx(0.5 / 2.0 / 2)  # nats / unit / two capabilities
    assert gain.stderr == pytest.approx(0.0, abs=1e-12)


def test_the_error_is_that_of_the_paired_differences() -> None:
    drops = np.array([0.1, 0.4, 0.2, 0.9])
    better = scores(np.array(HARD) - drops, [1.0, 1.0, 1.0, 0.0])
    gain = utility(weights={"text": 3, "quiz": 1}).gain(better, scores(HARD, EASY), SCALE)
    text = 0.75 / 2.0 * drops
    quiz = 0.25 / 0.5 * np.array([0, 1, 0, 0])
    assert gain.value == pytest.approx(text.mean() + quiz.mean())
    expected = np.sqrt(text.var(ddof=1) / 4 + quiz.var(ddof=1) / 4)
    assert gain.stderr == pytest.approx(expected)


def test_without_items_the_trials_count_as_independent() -> None:
    better = scores([x - 0.5 for x in HARD], EASY, keep=False)
    worse = scores(HARD, EASY, keep=False)
    gain = utility().gain(better, worse, SCALE)
    of_text, of_quiz = np.std(HARD, ddof=1) / 2, np.std(EASY, ddof=1) / 2
    expected = np.sqrt(2 * (0.5 / 2.0 * of_text) ** 2 + 2 * (0.5 / 0.5 * of_quiz) ** 2)
    assert gain.stderr == pytest.approx(expected)


def test_under_worst_only_the_deciding_capabilities_count() -> None:
    first = scores([2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 1.0, 0.0])  # scaled: text 0.5, quiz 0.5
    second = scores([2.9, 2.9, 2.9, 2.9], [1.0, 1.0, 1.0, 0.0])  # text 0.05 decides
    first["quiz"]["accuracy"] = score([0.0, 0.0, 0.5, 0.0], True)  # quiz 0.25 decides
    gain = utility(kind="worst").gain(first, second, SCALE)
    assert gain.value == pytest.approx(0.25 - 0.05)
    assert gain.stderr == pytest.approx(0.25 / 2 / 0.5)  # sd / sqrt(items) / unit, quiz alone


def test_an_unknown_standard_error_stays_unknown() -> None:
    first, second = scores(HARD, EASY), scores(HARD, EASY)
    first["text"]["loss"] = Score(2.0, None, 4, "nats/token", False)
    assert utility().gain(first, second, SCALE).stderr is None
