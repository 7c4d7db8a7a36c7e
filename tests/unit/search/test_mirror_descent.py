"""Mirror descent: the projection, the steps, what they cost, and what stays out of verdicts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from megatron_mergemix import config
from megatron_mergemix.config import evaluate as config_evaluate
from megatron_mergemix.evaluate.utility import Utility
from megatron_mergemix.mixtures.simplex import Bounds, to_vector, whole_simplex, within
from megatron_mergemix.search.mirror_descent import MirrorDescent, nearest_by_divergence
from megatron_mergemix.search.preference import Preference
from megatron_mergemix.search.purposes import is_gradient
from megatron_mergemix.synthetic.surfaces import SyntheticSurface


def descent(surface, bounds=None, utility=None, **more):
    num = len(surface.domains)
    return MirrorDescent(
        domains=surface.domains,
        utility=Utility(
            utility or config_evaluate.Utility(normalize="none"),
            {name: ["accuracy"] for name in surface.capabilities},
        ),
        bounds=bounds or whole_simplex(num),
        proportional=np.arange(1, num + 1) / np.arange(1, num + 1).sum(),
        settings=config.Search(strategy="gradient", **more),
    )


def explore(surface, strategy, num_items=300, factor=1.0):
    """Measure up to the verifications, in another unit of the scores."""
    trials = []
    strategy.tell(trials)
    while all(not proposal.purpose.startswith("verify:") for proposal in strategy.ask()):
        for proposal in strategy.ask():
            trials.append(in_unit(surface.measure(proposal, num_items), factor))
        strategy.tell(trials)
    return trials


def in_unit(trial, factor):
    def scores(measured):
        return {
            name: {m: replace(s, value=s.value * factor) for m, s in metrics.items()}
            for name, metrics in measured.items()
        }

    if trial.gradient is None:
        return replace(trial, scores=scores(trial.scores))
    slopes = {
        name: {m: {d: v * factor for d, v in slope.items()} for m, slope in metrics.items()}
        for name, metrics in trial.gradient.slopes.items()
    }
    gradient = replace(trial.gradient, scores=scores(trial.gradient.scores), slopes=slopes)
    return replace(trial, gradient=gradient)


def regret(surface, point):
    return 100 * (surface.optimum - surface.utility(point))


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_the_projection_is_the_mixture_of_least_divergence(data):
    num = data.draw(st.integers(2, 5))
    share = st.floats(0.01, 1.0)
    point = np.array([data.draw(share) for _ in range(num)])
    low = np.array([data.draw(st.floats(0, 0.9 / num)) for _ in range(num)])
    high = np.maximum(low, np.array([data.draw(st.floats(1.1 / num, 1.0)) for _ in range(num)]))
    bounds = Bounds(low, high)
    found = nearest_by_divergence(point, bounds)
    assert within(found, bounds)

    def divergence(mixture):
        mixture = np.maximum(mixture, 1e-12)
        return float((mixture * np.log(mixture / point)).sum())

    best = minimize(
        divergence,
        np.full(num, 1 / num),
        bounds=list(zip(low, high, strict=True)),
        constraints={"type": "eq", "fun": lambda mixture: mixture.sum() - 1},
        options={"ftol": 1e-12},
    )
    assert divergence(found) <= best.fun + 1e-6


def test_a_domain_without_room_has_no_share_and_a_mixture_within_stays():
    bounds = Bounds(np.zeros(3), np.array([1.0, 0.0, 1.0]))
    found = nearest_by_divergence(np.array([0.2, 0.0, 0.6]), bounds)
    assert found.tolist() == pytest.approx([0.25, 0.0, 0.75])
    inside = np.array([0.3, 0.3, 0.4])
    assert nearest_by_divergence(inside, whole_simplex(3)).tolist() == pytest.approx(inside)


@pytest.mark.parametrize("num_domains", [3, 7, 15])
def test_exact_gradients_lead_to_the_optimum_however_many_domains(num_domains):
    for seed in range(3):
        surface = SyntheticSurface(num_domains, seed)
        strategy = descent(surface)
        trials = explore(surface, strategy, num_items=10**7)
        assert sum(map(is_gradient, trials)) == 16
        last = strategy.candidates(strategy.landscape(trials[1:]))[0].mixture
        assert regret(surface, last) < 0.02


def test_the_mean_of_noisy_steps_is_better_than_the_last_one():
    last, mean = [], []
    for seed in range(8):
        surface = SyntheticSurface(4, seed)
        strategy = descent(surface, seed=seed, minibatch=0.01, steps=24)
        trials = explore(surface, strategy)
        candidates = strategy.candidates(strategy.landscape(trials[1:]))
        last.append(regret(surface, candidates[0].mixture))
        mean.append(regret(surface, candidates[1].mixture))
    assert np.mean(mean) < np.mean(last)


def test_a_lucky_score_of_the_design_does_not_win_over_where_gradients_led():
    """On this surface a mixture far away scores best by luck, and the few scores show no trend."""
    surface = SyntheticSurface(5, seed=12)
    strategy = descent(surface, steps=20, seed=12)
    trials = []
    while not strategy.done():
        trials += [surface.measure(proposal, 300, 12) for proposal in strategy.ask()]
        strategy.tell(trials)
    verdict = strategy.recommend()
    lucky = verdict.alternatives["best observed"]
    assert lucky["expected"] > verdict.alternatives["mean"]["expected"]
    assert regret(surface, to_vector(lucky["mixture"], surface.domains)) > 1
    assert verdict.source == "mean"
    assert regret(surface, to_vector(verdict.mixture, surface.domains)) < 0.1


def test_the_unit_of_the_utility_does_not_matter():
    surface = SyntheticSurface(4, 2)
    paths = []
    for factor in (1.0, 40.0):
        trials = explore(surface, descent(surface), factor=factor)
        paths.append([dict(trial.mixture) for trial in trials])
    for one, other in zip(*paths, strict=True):
        assert one == pytest.approx(other, abs=1e-9)


def test_only_capabilities_that_count_are_differentiated():
    surface = SyntheticSurface(3, 0)
    weights = {name: float(index < 2) for index, name in enumerate(surface.capabilities)}
    strategy = descent(surface, utility=config_evaluate.Utility(normalize="none", weights=weights))
    batches = [t.gradient.minibatch for t in explore(surface, strategy) if t.gradient]
    assert {batch.capabilities for batch in batches} == {("capability0", "capability1")}
    assert [batch.number for batch in batches] == list(range(16))


def test_the_worst_capability_is_lifted():
    surface = SyntheticSurface(4, 1)
    strategy = descent(
        surface, utility=config_evaluate.Utility(kind="worst", normalize="none"), steps=40
    )
    trials = explore(surface, strategy, num_items=10**7)
    points = np.array([to_vector(t.mixture, surface.domains) for t in trials if t.gradient])
    worst = surface.accuracies(points).min(axis=1)
    dense = np.random.default_rng(0).dirichlet(np.ones(4), size=20000)
    best = surface.accuracies(dense).min(axis=1).max()
    assert worst[0] < best - 0.02
    assert worst[20:].mean() > best - 0.01


def test_scores_of_minibatches_enter_neither_the_scale_nor_a_surrogate_nor_the_verdict():
    surface = SyntheticSurface(3, 0)
    strategy = descent(surface)
    trials = explore(surface, strategy)
    while not strategy.done():
        trials += [surface.measure(proposal) for proposal in strategy.ask()]
        strategy.tell(trials)
    advice = strategy.recommend()
    scores = {trial.index for trial in trials if trial.gradient is None}
    assert {a["trial"] for a in advice.alternatives.values()} <= scores
    # A gradient trial at a candidate's own mixture does not stand for its verification.
    last = next(trial for trial in trials if trial.purpose == "verify:last")
    again = descent(surface)
    derived = next(trial for trial in trials if trial.gradient)
    without = [t for t in trials if not t.purpose.startswith("verify:")]
    final = max(t.index for t in without)
    again.tell([replace(t, mixture=last.mixture) if t.index == final else t for t in without])
    assert any(proposal.purpose == "verify:last" for proposal in again.ask())
    assert derived.scores == {}


def test_after_a_failed_gradient_the_descent_goes_on_from_where_it_was():
    surface = SyntheticSurface(3, 0)
    strategy = descent(surface, steps=4)
    trials = []
    while not strategy.done():
        for proposal in strategy.ask():
            trial = surface.measure(proposal)
            if proposal.purpose == "gradient:2":
                trial = replace(trial, gradient=None, error="out of memory")
            trials.append(trial)
        strategy.tell(trials)
    second, third = (next(t for t in trials if t.purpose == f"gradient:{n}") for n in (2, 3))
    assert second.mixture == third.mixture
    assert third.gradient is not None
    assert third.gradient.minibatch.number == 2
    assert strategy.recommend().notes[0].endswith(f"left out: {second.index}.")


def test_the_preference_has_the_slope_it_says():
    domains = ["a", "b", "c"]
    preference = Preference(config.Search(kl=0.4), domains, np.array([0.2, 0.3, 0.5]))
    point = np.array([0.5, 0.3, 0.2])
    for index, found in enumerate(preference.slope(point)):
        step = 1e-6 * np.eye(3)[index]
        difference = preference(np.array([point + step])) - preference(np.array([point - step]))
        assert found == pytest.approx(difference[0] / 2e-6, rel=1e-6)


def test_a_trusted_prior_holds_the_descent_back():
    surface = SyntheticSurface(3, 0)
    ends = []
    for kl in (0.0, 0.3, 30.0):
        strategy = descent(surface, kl=kl)
        trials = explore(surface, strategy)
        ends.append(strategy.candidates(strategy.landscape(trials[1:]))[1].mixture)
    distances = [np.abs(end - np.array([1, 2, 3]) / 6).max() for end in ends]
    assert distances[0] > distances[1] > distances[2]
