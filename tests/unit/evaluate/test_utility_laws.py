"""What holds of the utility for any scores: accuracies and losses, several metrics, all kinds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mergemix.config import evaluate as config_evaluate
from megatron_mergemix.evaluate.utility import Scale, Utility
from megatron_mergemix.trials import Score, Scores

OBJECTIVE = {"web": ("loss",), "math": ("gsm", "minerva"), "tests": ("rate",)}
NUM_ITEMS = 6


def drawn(rng: np.random.Generator, with_items: bool = True) -> Scores:
    """Return scores of one candidate: a loss, two accuracies, and a number without any error."""

    def score(values: np.ndarray, unit: str, higher: bool) -> Score:
        items = tuple(map(float, values)) if with_items else ()
        stderr = float(values.std(ddof=1) / np.sqrt(len(values)))
        return Score(float(values.mean()), stderr, len(values), unit, higher, items)

    right = rng.integers(0, 2, size=(2, NUM_ITEMS)).astype(float)
    return {
        "web": {"loss": score(rng.uniform(1, 5, NUM_ITEMS), "nats/token", False)},
        "math": {
            "gsm": score(right[0], "accuracy", True),
            "minerva": score(right[1], "accuracy", True),
        },
        "tests": {"rate": Score(float(rng.uniform()), 0.1, 1, "", True)},
    }


def utilities(kind: str, normalize: str, seed: int) -> tuple[Utility, Scale, list[Scores]]:
    """Return a calibrated utility with some weights 0, and the trials that it was calibrated on."""
    rng = np.random.default_rng(seed)
    weights = dict(zip(OBJECTIVE, rng.integers(0, 2, 3).astype(float), strict=True))
    weights["web"] = 1.0
    if kind == "mean":
        weights = {name: weight * float(rng.uniform(0.1, 3)) for name, weight in weights.items()}
    utility = Utility(
        config_evaluate.Utility(kind=kind, normalize=normalize, weights=weights), OBJECTIVE
    )
    trials = [drawn(rng) for _ in range(8)]
    # Two that differ in every capability, whatever was drawn.
    for right, trial in ((0.0, trials[0]), (1.0, trials[1])):
        math = {m: Score(right, 0.1, 6, "accuracy", True, (right,) * 6) for m in OBJECTIVE["math"]}
        trial["math"] = math  # type: ignore[index]
    values = np.array([utility.measure(trial)[0] for trial in trials])
    return utility, utility.calibrate(values, np.arange(8) < 4), trials


every = given(
    kind=st.sampled_from(["mean", "worst"]),
    normalize=st.sampled_from(["vertices", "zscore", "none"]),
    seed=st.integers(0, 10**6),
)


@every
@settings(max_examples=60, deadline=None)
def test_a_better_score_never_lowers_the_utility(kind: str, normalize: str, seed: int) -> None:
    utility, scale, trials = utilities(kind, normalize, seed)
    before = utility.of_trial(trials[2], scale).value
    for capability, metrics in OBJECTIVE.items():
        for metric in metrics:
            score = trials[2][capability][metric]
            better = score.value + (0.5 if score.higher_is_better else -0.5)
            moved = {**trials[2], capability: {**trials[2][capability], metric: score}}
            moved[capability][metric] = Score(better, 0.1, 1, "", score.higher_is_better)  # type: ignore[index]
            after = utility.of_trial(moved, scale).value
            assert after >= before - 1e-12
            counts = utility.weights[list(OBJECTIVE).index(capability)] > 0
            if not counts or kind == "mean":
                assert (after > before) == counts


@every
@settings(max_examples=60, deadline=None)
def test_gains_add_up_and_nothing_is_gained_over_itself(
    kind: str, normalize: str, seed: int
) -> None:
    utility, scale, trials = utilities(kind, normalize, seed)
    one, other = (utility.of_trial(trial, scale).value for trial in trials[2:4])
    gain, back = (
        utility.gain(trials[2], trials[3], scale),
        utility.gain(trials[3], trials[2], scale),
    )
    assert gain.value == pytest.approx(one - other)
    assert gain.value == pytest.approx(-back.value)
    assert gain.stderr == pytest.approx(back.stderr)
    assert utility.gain(trials[2], trials[2], scale).value == 0.0


@every
@settings(max_examples=60, deadline=None)
def test_units_do_not_matter_where_scores_are_normalized(
    kind: str, normalize: str, seed: int
) -> None:
    """A loss in other units, from another zero, is the same utility with the same error."""
    if normalize == "none":
        return
    utility, scale, trials = utilities(kind, normalize, seed)

    def in_other_units(trial: Scores) -> Scores:
        score = trial["web"]["loss"]
        items = tuple(1.7 * item + 4 for item in score.items)
        assert score.stderr is not None
        moved = Score(1.7 * score.value + 4, 1.7 * score.stderr, 6, "bits", False, items)
        return {**trial, "web": {"loss": moved}}

    others = [in_other_units(trial) for trial in trials]
    values = np.array([utility.measure(trial)[0] for trial in others])
    other_scale = utility.calibrate(values, np.arange(8) < 4)
    for trial, other in zip(trials, others, strict=True):
        found, expected = utility.of_trial(other, other_scale), utility.of_trial(trial, scale)
        assert found == pytest.approx(expected)
    gains = utility.gain(others[2], others[3], other_scale), utility.gain(*trials[2:4], scale)
    assert gains[0] == pytest.approx(gains[1])


@given(seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_vertices_lie_between_0_and_1_with_both_reached(seed: int) -> None:
    utility, scale, trials = utilities("mean", "vertices", seed)
    values = np.array([utility.measure(trial)[0] for trial in trials[:4]])
    scaled = ((values - scale.zero) / scale.unit)[:, utility.weights > 0]
    assert scaled.min(axis=0) == pytest.approx(0)
    assert scaled.max(axis=0) == pytest.approx(1)
