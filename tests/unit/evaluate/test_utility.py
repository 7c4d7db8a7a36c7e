from __future__ import annotations

import numpy as np
import pytest

from megatron_mergemix.config import evaluate as config_evaluate
from megatron_mergemix.errors import EvaluationError, SearchError
from megatron_mergemix.evaluate.utility import Scale, Utility, objective_of
from megatron_mergemix.trials import Score

OBJECTIVE = {"web": ("loss",), "math": ("gsm", "minerva")}


def loss(value, stderr=0.1):
    return Score(value, stderr, 100, "nats/token", higher_is_better=False)


def accuracy(value, stderr=0.03):
    return Score(value, stderr, 100, "accuracy", higher_is_better=True)


def scores(web=2.0, gsm=0.5, minerva=0.3):
    return {
        "web": {"loss": loss(web)},
        "math": {"gsm": accuracy(gsm), "minerva": accuracy(minerva, 0.04)},
    }


def utility(objective=OBJECTIVE, **settings):
    return Utility(config_evaluate.Utility(**settings), objective)


def test_the_objective_is_the_metric_of_each_loss_task():
    evaluate = config_evaluate.Evaluate(
        capabilities={
            "web": {"loss": {"prefixes": ["a"]}},
            "code": {"loss": {"prefixes": ["b"], "metric": "bpb"}},
        }
    )
    assert objective_of(evaluate) == {"web": ("loss",), "code": ("bpb",)}


def test_losses_are_negated_and_metrics_of_a_capability_averaged():
    values, stderrs = utility().measure(scores())
    assert values.tolist() == pytest.approx([-2.0, 0.4])
    # Mean of two: sqrt(0.03^2 + 0.04^2) / 2.
    assert stderrs.tolist() == pytest.approx([0.1, 0.025])


def test_an_unknown_error_of_one_metric_makes_the_capability_unknown():
    measured = scores()
    measured["math"]["gsm"] = accuracy(0.5, None)
    _, stderrs = utility().measure(measured)
    assert stderrs[0] == 0.1
    assert np.isnan(stderrs[1])


def test_a_missing_metric_is_named_with_what_there_is():
    measured = scores()
    del measured["math"]["minerva"]
    with pytest.raises(EvaluationError, match="'minerva' of capability 'math', but .* gave gsm"):
        utility().measure(measured)
    with pytest.raises(EvaluationError, match="'loss' of capability 'web', but .* gave nothing"):
        utility().measure({"math": measured["math"]})


def test_a_score_that_is_not_finite_is_refused():
    with pytest.raises(EvaluationError, match=r"web\.loss is nan"):
        utility().measure(scores(web=float("nan")))


def test_vertices_put_the_worst_expert_at_0_and_the_best_at_1():
    u = utility()
    values = np.array([[-3.0, 0.2], [-2.0, 0.6], [-1.0, 0.9]])  # the last is no vertex
    scale = u.calibrate(values, np.array([True, True, False]))
    scaled = (values - scale.zero) / scale.unit
    assert np.allclose(scaled, [[0, 0], [1, 1], [2, 1.75]])


def test_zscore_is_over_all_trials():
    u = utility(normalize="zscore")
    values = np.array([[-3.0, 0.2], [-1.0, 0.6]])
    scale = u.calibrate(values, np.array([False, False]))
    assert scale.zero.tolist() == pytest.approx([-2.0, 0.4])
    assert scale.unit.tolist() == pytest.approx([1.0, 0.2])


def test_none_is_the_raw_number():
    u = utility(normalize="none")
    scale = u.calibrate(np.zeros((0, 2)), np.zeros(0, dtype=bool))
    assert u.of_trial(scores(), scale).value == pytest.approx((-2.0 + 0.4) / 2)


def test_a_capability_that_is_the_same_everywhere_has_no_scale():
    values = np.array([[-3.0, 0.4], [-2.0, 0.4]])
    both = np.array([True, True])
    with pytest.raises(SearchError, match="'math' has the same score in all 2 vertices"):
        utility().calibrate(values, both)
    with pytest.raises(SearchError, match="'math' has the same score in all 2 trials"):
        utility(normalize="zscore").calibrate(values, both)
    # One that does not count needs none.
    u = utility(weights={"web": 1, "math": 0})
    assert u.of_trial(scores(web=2.5), u.calibrate(values, both)).value == pytest.approx(0.5)


def test_one_vertex_is_no_scale():
    with pytest.raises(SearchError, match="vertices needs two successful vertices; got 1"):
        utility().calibrate(np.array([[-3.0, 0.4], [-2.0, 0.5]]), np.array([True, False]))


def test_the_mean_is_weighted_and_propagates_the_error():
    u = utility(weights={"web": 3, "math": 1})
    scale = Scale(np.array([-3.0, 0.0]), np.array([2.0, 0.5]))
    measured = u.of_trial(scores(), scale)
    assert measured.value == pytest.approx((3 * 0.5 + 0.8) / 4)
    assert measured.stderr == pytest.approx(np.hypot(0.75 * 0.1 / 2, 0.25 * 0.025 / 0.5))


def test_the_worst_capability_gives_its_number_and_its_error():
    u = utility(kind="worst")
    scale = Scale(np.array([-3.0, 0.0]), np.array([2.0, 0.5]))
    measured = u.of_trial(scores(), scale)
    assert measured.value == pytest.approx(0.5)
    assert measured.stderr == pytest.approx(0.05)


def test_the_worst_of_counted_capabilities_ignores_the_others():
    u = utility(kind="worst", weights={"web": 0, "math": 1})
    scale = Scale(np.array([-3.0, 0.0]), np.array([2.0, 0.5]))
    measured = scores()
    measured["web"]["loss"] = loss(2.0, None)
    assert u.of_trial(measured, scale).value == pytest.approx(0.8)
    assert u.of_trial(measured, scale).stderr == pytest.approx(0.05)


def test_an_unknown_error_makes_the_utility_unknown_only_if_it_counts():
    measured = scores()
    measured["web"]["loss"] = loss(2.0, None)
    scale = Scale(np.zeros(2), np.ones(2))
    assert utility().of_trial(measured, scale).stderr is None
    counted = utility(weights={"web": 0, "math": 2}).of_trial(measured, scale)
    assert counted.stderr == pytest.approx(0.025)


def test_predictions_on_many_points_combine_as_single_trials_do():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(7, 3, 2))
    scale = Scale(np.array([-1.0, 0.5]), np.array([2.0, 0.1]))
    for kind in ("mean", "worst"):
        u = utility(kind=kind)
        many = u.combine(values, scale)
        assert many.shape == (7, 3)
        assert many[4, 1] == pytest.approx(float(u.combine(values[4, 1], scale)))


@pytest.mark.parametrize("kind", ["mean", "worst"])
@pytest.mark.parametrize("web", [1.5, 2.5])
def test_the_slope_of_the_utility_is_that_of_its_scores(kind, web):
    """Against differences: scores that depend linearly on two shares."""
    measure = utility(kind=kind)
    scale = Scale(np.array([-2.5, 0.1]), np.array([0.8, 0.5]))
    slopes = {
        "web": {"loss": {"a": 0.3, "b": -0.2}},
        "math": {"gsm": {"a": 0.1, "b": 0.5}, "minerva": {"a": -0.4, "b": 0.05}},
    }

    def value(a, b):
        at = {"a": a, "b": b}
        shifted = {
            (capability, metric): sum(slope[name] * at[name] for name in at)
            for capability, metrics in slopes.items()
            for metric, slope in metrics.items()
        }
        moved = scores(
            web + shifted["web", "loss"],
            0.5 + shifted["math", "gsm"],
            0.3 + shifted["math", "minerva"],
        )
        return measure.of_trial(moved, scale).value

    found = measure.slope(scores(web), slopes, scale)
    assert found["a"] == pytest.approx((value(1e-4, 0) - value(-1e-4, 0)) / 2e-4)
    assert found["b"] == pytest.approx((value(0, 1e-4) - value(0, -1e-4)) / 2e-4)


def test_a_capability_that_does_not_count_needs_no_slope():
    measure = utility(weights={"web": 0.0, "math": 1.0})
    only_math = {"math": scores()["math"]}
    slopes = {"math": {"gsm": {"a": 1.0}, "minerva": {"a": 0.0}}}
    found = measure.slope(only_math, slopes, Scale(np.zeros(2), np.array([1.0, 0.25])))
    assert found == {"a": pytest.approx(2.0)}
