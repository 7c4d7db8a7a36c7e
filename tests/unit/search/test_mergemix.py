from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mergemix import config
from megatron_mergemix.config import evaluate as config_evaluate
from megatron_mergemix.errors import ConfigError, SearchError
from megatron_mergemix.evaluate.utility import Utility
from megatron_mergemix.mixtures.simplex import Bounds, to_vector, uniform, whole_simplex, within
from megatron_mergemix.search.calibration import utility_scale
from megatron_mergemix.search.make import STRATEGIES, make_strategy
from megatron_mergemix.search.mergemix import MergeMix
from megatron_mergemix.synthetic.surfaces import SyntheticSurface
from megatron_mergemix.trials import Trial


def strategy_on(surface, bounds=None, normalize="none", **search):
    num_domains = len(surface.domains)
    return make_strategy(
        config.Search(**search),
        domains=surface.domains,
        utility=Utility(
            config_evaluate.Utility(normalize=normalize),
            {name: ["accuracy"] for name in surface.capabilities},
        ),
        bounds=bounds or whole_simplex(num_domains),
        proportional=np.arange(1, num_domains + 1) / np.arange(1, num_domains + 1).sum(),
    )


def search(surface, strategy, num_items=300, seed=0, failing=()):
    """Drive the strategy to its end and return all trials."""
    trials = []
    while not strategy.done():
        for proposal in strategy.ask():
            trial = surface.measure(proposal, num_items, seed)
            if proposal.index in failing:
                trial = replace(trial, scores={}, error="the evaluation ran out of memory")
            trials.append(trial)
        strategy.tell(trials)
    return trials


def mean_accuracy(trial):
    return np.mean([score["accuracy"].value for score in trial.scores.values()])


@pytest.fixture(scope="module")
def finished():
    """A finished search: its surface, its strategy, and its trials."""
    surface = SyntheticSurface(3, seed=0)
    strategy = strategy_on(surface, trials=14)
    return surface, strategy, search(surface, strategy)


# ---- what is asked ----


def test_the_search_asks_the_base_the_design_and_two_verifications(finished):
    _, _, trials = finished
    assert [trial.index for trial in trials] == list(range(17))
    assert trials[0].purpose == "base"
    assert trials[0].mixture == {}
    assert [t.purpose for t in trials[1:5]] == ["vertex"] * 3 + ["prior:uniform"]
    assert [t.purpose for t in trials[15:]] == ["verify:argmax", "verify:top-k"]


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 0.15), st.floats(0.5, 1.0))
def test_every_asked_mixture_is_within_the_bounds(seed, low, high):
    surface = SyntheticSurface(3, seed=1, num_capabilities=2)
    bounds = Bounds(np.full(3, low), np.array([high, 1.0, high]))
    trials = search(surface, strategy_on(surface, bounds, trials=12, seed=seed))
    mixtures = np.array([to_vector(trial.mixture, surface.domains) for trial in trials[1:]])
    assert len(mixtures) >= 13
    assert within(mixtures, bounds).all()


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_replaying_any_part_of_the_journal_asks_for_the_rest_of_it(finished, data):
    surface, _, trials = finished
    design_is_told = data.draw(st.booleans())
    always = trials[:15] if design_is_told else []
    optional = trials[15:] if design_is_told else trials[:15]
    told = always + [trial for trial in optional if data.draw(st.booleans())]
    missing = [trial for trial in trials[: 17 if design_is_told else 15] if trial not in told]
    if not missing:  # the whole design leads to the verifications
        missing = trials[15:] if not design_is_told else []
    strategy = strategy_on(surface, trials=14)
    strategy.tell(data.draw(st.permutations(told)))
    asked = strategy.ask()
    assert [(p.index, p.purpose, p.mixture) for p in asked] == [
        (t.index, t.purpose, t.mixture) for t in missing
    ]
    assert strategy.done() == (not missing)


@pytest.mark.parametrize("lost", [15, 16])
def test_a_verification_that_was_lost_is_asked_again_under_its_index(finished, lost):
    surface, _, trials = finished
    strategy = strategy_on(surface, trials=14)
    strategy.tell([trial for trial in trials if trial.index != lost])
    asked = strategy.ask()
    assert [(p.index, p.purpose) for p in asked] == [(lost, trials[lost].purpose)]
    assert asked[0].mixture == trials[lost].mixture


def test_the_order_of_trials_does_not_change_the_recommendation(finished):
    surface, strategy, trials = finished
    other = strategy_on(surface, trials=14)
    other.tell(trials[::-1])
    assert other.recommend() == strategy.recommend()


def test_telling_replaces_what_was_told(finished):
    surface, _, trials = finished
    strategy = strategy_on(surface, trials=14)
    strategy.tell(trials)
    assert strategy.done()
    strategy.tell(trials[:15])
    assert [proposal.index for proposal in strategy.ask()] == [15, 16]
    strategy.tell([])
    assert len(strategy.ask()) == 15


def test_an_optimum_that_was_measured_already_is_not_measured_again():
    surface = SyntheticSurface(3, seed=0)
    # Every capability grows with the first domain: the optimum is its vertex.
    surface._best = np.tile(np.array([3.0, -1.0, -1.0]), (5, 1))
    strategy = strategy_on(surface, trials=14, top_k=1)
    trials = search(surface, strategy, num_items=100_000)
    recommendation = strategy.recommend()
    assert recommendation.mixture == {"domain0": 1.0, "domain1": 0.0, "domain2": 0.0}
    assert len(trials) == 15
    assert recommendation.alternatives["argmax"]["trial"] == 1


# ---- failures ----


def test_failed_trials_are_left_out_and_never_asked_again():
    surface = SyntheticSurface(3, seed=0)
    strategy = strategy_on(surface, trials=14)
    trials = search(surface, strategy, failing=(7, 9))
    assert [trial.index for trial in trials] == list(range(17))
    notes = strategy.recommend().notes
    assert notes[0] == "2 of 14 trials failed and were left out: 7, 9."


def test_what_the_scale_and_the_comparisons_rest_on_is_asked_once_more():
    """As where the environment of a command was broken when the search began."""
    surface = SyntheticSurface(3, seed=0)
    strategy = strategy_on(surface, trials=14, normalize="vertices")
    trials = search(surface, strategy, failing=(0, 1, 2))
    assert [(t.index, t.purpose) for t in trials[15:18]] == [
        *[(15, "base"), (16, "vertex"), (17, "vertex")]
    ]
    assert [t.mixture for t in trials[15:18]] == [t.mixture for t in trials[:3]]
    whole = strategy_on(surface, trials=14, normalize="vertices")
    others = search(surface, whole)
    found, expected = (
        utility_scale(each.utility, measured)
        for each, measured in ((strategy, trials), (whole, others))
    )
    assert found.unit == pytest.approx(expected.unit, rel=0.3), "but for noise"
    assert strategy.recommend().notes[0] == "2 of 16 trials failed and were left out: 1, 2."
    for length in range(len(trials)):  # wherever it is killed
        strategy.tell(trials[:length])
        asked = strategy.ask()
        assert [p.index for p in asked][:1] == [length]
        assert dict(asked[0].mixture) == trials[length].mixture


def test_what_fails_twice_is_left_out_and_the_scale_says_so():
    surface = SyntheticSurface(4, seed=0)
    strategy = strategy_on(surface, trials=14, normalize="vertices")
    trials = search(surface, strategy, failing=(2, 15))
    assert [t.purpose for t in trials if t.index > 14] == [
        *["vertex", "verify:argmax", "verify:top-k"]
    ]
    notes = " ".join(strategy.recommend().notes)
    assert "A domain alone could not be scored (trials 2, 15), so what 0" in notes


def test_a_journal_that_went_on_from_a_failed_vertex_is_still_true():
    """Of a version that asked no mixture twice."""
    surface = SyntheticSurface(3, seed=0)
    strategy = strategy_on(surface, trials=14)
    trials = search(surface, strategy, failing=(2,))
    older = [t for t in trials if t.index < 15]
    older += [replace(t, index=t.index - 1) for t in trials if t.index > 15]
    strategy.tell(older)
    assert {proposal.purpose for proposal in strategy.ask()} <= {"verify:argmax", "verify:top-k"}
    assert strategy.recommend().utility > 0


def test_a_failed_base_is_asked_once_more_and_no_harm():
    surface = SyntheticSurface(3, seed=0)
    strategy = strategy_on(surface, trials=14)
    assert len(search(surface, strategy, failing=(0, 15))) == 18
    assert strategy.recommend().utility > 0


def test_more_than_half_failing_ends_the_search_with_the_first_cause():
    surface = SyntheticSurface(3, seed=0)
    strategy = strategy_on(surface, trials=14)
    assert len(search(surface, strategy, failing=range(1, 9))) == 15
    with pytest.raises(SearchError, match="8 of 14 .* trial 1: the evaluation ran out of memory"):
        strategy.recommend()


def test_a_failed_verification_cannot_win_and_is_noted(finished):
    surface, _, _ = finished
    strategy = strategy_on(surface, trials=14)
    search(surface, strategy, failing=(15,))
    recommendation = strategy.recommend()
    assert recommendation.source != "argmax"
    assert "argmax" not in recommendation.alternatives
    assert any("argmax candidate was not measured" in note for note in recommendation.notes)


def test_when_both_verifications_fail_the_best_observed_mixture_remains(finished):
    surface, _, _ = finished
    strategy = strategy_on(surface, trials=14)
    search(surface, strategy, failing=(15, 16))
    assert strategy.recommend().source == "best observed"


def test_an_unfinished_search_has_no_recommendation(finished):
    surface, _, trials = finished
    strategy = strategy_on(surface, trials=14)
    strategy.tell(trials[:10])
    with pytest.raises(SearchError, match="5 of 15 trials are not measured yet"):
        strategy.recommend()


# ---- journals of other settings ----


def test_a_journal_of_other_settings_is_refused_with_the_difference(finished):
    surface, _, trials = finished
    strategy = strategy_on(surface, trials=20)
    message = r"Trial 6 of the journal measured {domain0: .*}.*, but these settings ask for {"
    with pytest.raises(SearchError, match=message):
        strategy.tell(trials)


def test_a_journal_of_other_domains_is_refused(finished):
    surface, _, trials = finished
    renamed = [
        replace(t, mixture={name.upper(): share for name, share in t.mixture.items()})
        for t in trials
    ]
    with pytest.raises(SearchError, match="Trial 1 of the journal measured {DOMAIN0: 1,"):
        strategy_on(surface, trials=14).tell(renamed)


def test_a_base_where_a_mixture_is_due_is_refused(finished):
    surface, _, trials = finished
    with pytest.raises(SearchError, match="Trial 3 of the journal measured the base .*, but"):
        strategy_on(surface, trials=14).tell([replace(trials[3], mixture={})])


def test_a_trial_beyond_the_design_that_verifies_nothing_is_refused(finished):
    surface, _, trials = finished
    with pytest.raises(SearchError, match=r"Trial 20 of the journal \(lattice\) is beyond the 14"):
        strategy_on(surface, trials=14).tell([replace(trials[8], index=20)])


def test_another_surrogate_verifies_its_own_candidates_and_keeps_the_design(finished):
    surface, _, trials = finished
    strategy = strategy_on(surface, trials=14, surrogate="quadratic")
    strategy.tell(trials)
    asked = strategy.ask()
    assert asked
    assert [proposal.index for proposal in asked] == list(range(17, 17 + len(asked)))
    more = trials + [surface.measure(proposal) for proposal in asked]
    strategy.tell(more)
    assert strategy.done()
    evidence = strategy.recommend().surrogates["capability0"]
    assert set(evidence["candidates"]) == {"quadratic"}


# ---- the recommendation ----


def test_the_recommendation_carries_its_evidence(finished):
    surface, strategy, trials = finished
    recommendation = strategy.recommend()
    alternatives = recommendation.alternatives
    assert set(alternatives) == {
        "argmax", "top-k mean", "best observed", "uniform", "proportional",
    }  # fmt: skip
    taken = alternatives[recommendation.source]
    assert recommendation.source == "top-k mean"  # nothing is surely better
    assert recommendation.mixture == taken["mixture"]
    for alternative in alternatives.values():
        trial = trials[alternative["trial"]]
        accuracies = [trial.scores[name]["accuracy"] for name in surface.capabilities]
        assert alternative["mixture"] == trial.mixture
        assert alternative["observed"] == pytest.approx(np.mean([s.value for s in accuracies]))
        stderr = np.linalg.norm([s.stderr for s in accuracies]) / 5
        assert alternative["stderr"] == pytest.approx(stderr)
        assert alternative["gain"] == pytest.approx(taken["observed"] - alternative["observed"])
    assert taken["gain_stderr"] == 0.0
    assert alternatives["uniform"]["gain_stderr"] == pytest.approx(
        np.hypot(taken["stderr"], alternatives["uniform"]["stderr"])
    )
    best = max(
        trials[1:15], key=lambda t: np.mean([s["accuracy"].value for s in t.scores.values()])
    )
    assert alternatives["best observed"]["trial"] == best.index


def test_the_recommendation_is_plain_data(finished):
    _, strategy, _ = finished
    assert json.loads(json.dumps(asdict(strategy.recommend())))["source"]


def test_a_lucky_trial_does_not_win_over_what_all_the_others_say(finished):
    surface, _, trials = finished
    truth = surface.utility(np.array([to_vector(t.mixture, surface.domains) for t in trials[1:15]]))
    optimum = surface.optimum
    # Four points below the optimum, but measured above everything else.
    lucky = trials[1 + int(np.argmin(np.abs(truth - (optimum - 0.04))))]
    best = max(trials[1:15], key=mean_accuracy)
    scores = {
        name: {"accuracy": replace(score["accuracy"], value=score["accuracy"].value + 0.005)}
        for name, score in best.scores.items()
    }
    strategy = strategy_on(surface, trials=14)
    told = [replace(t, scores=scores) if t.index == lucky.index else t for t in trials[:15]]
    strategy.tell(told)
    told += [surface.measure(proposal) for proposal in strategy.ask()]
    strategy.tell(told)
    recommendation = strategy.recommend()
    assert recommendation.alternatives["best observed"]["trial"] == lucky.index
    assert recommendation.source != "best observed"
    regret = optimum - surface.utility(to_vector(recommendation.mixture, surface.domains))
    assert regret < 0.015
    measured_more = f"Trial {lucky.index} measured" in " ".join(recommendation.notes)
    assert measured_more == (recommendation.utility < mean_accuracy(best) + 0.005)


def test_a_capability_of_pure_noise_is_noted():
    surface = SyntheticSurface(3, seed=0)
    strategy = strategy_on(surface, trials=20)
    trials = search(surface, strategy)
    noise = np.random.default_rng(5)

    def scramble(trial: Trial) -> Trial:
        scores = dict(trial.scores)
        accuracy = scores["capability1"]["accuracy"]
        scores["capability1"] = {"accuracy": replace(accuracy, value=float(noise.random()))}
        return replace(trial, scores=scores)

    strategy.tell([scramble(trial) for trial in trials[:21]])
    asked = strategy.ask()
    strategy.tell([scramble(t) for t in trials[:21] + [surface.measure(p) for p in asked]])
    poor = [note for note in strategy.recommend().notes if "ranks left-out trials poorly" in note]
    assert len(poor) == 1
    assert poor[0].startswith("The surrogate of capability1 ranks")


def test_a_gain_within_its_error_is_noted():
    surface = SyntheticSurface(3, seed=0)
    surface._best = np.tile(uniform(3), (5, 1))  # nothing beats the uniform mixture
    strategy = strategy_on(surface, trials=14)
    search(surface, strategy)
    notes = [note for note in strategy.recommend().notes if "uniform" in note]
    assert len(notes) == 1


def test_whoever_holds_the_journal_computes_the_scale_of_the_search(finished):
    surface, _, trials = finished
    utility = Utility(config_evaluate.Utility(), {"capability0": ["accuracy"]})
    vertices = [t.scores["capability0"]["accuracy"].value for t in trials[1:4]]
    scale = utility_scale(utility, trials[::-1])
    assert scale.zero.tolist() == [min(vertices)]
    assert scale.unit.tolist() == [pytest.approx(max(vertices) - min(vertices))]
    zscore = utility_scale(
        Utility(config_evaluate.Utility(normalize="zscore"), {"capability0": ["accuracy"]}), trials
    )
    designed = [t.scores["capability0"]["accuracy"].value for t in trials[1:15]]
    assert zscore.zero.tolist() == [pytest.approx(np.mean(designed))]


# ---- settings ----


def test_too_few_trials_for_a_surrogate_are_refused_before_anything_is_trained():
    with pytest.raises(
        ConfigError, match=r"to 40 mixtures; expected at least 42.*quadratic.*Raise"
    ):
        strategy_on(SyntheticSurface(7, seed=0), trials=40, surrogate="quadratic")


def test_bounds_that_exclude_each_other_are_refused():
    surface = SyntheticSurface(3, seed=0)
    bounds = Bounds(np.full(3, 0.4), np.ones(3))
    with pytest.raises(ConfigError, match="least shares of the domains sum to 1.2"):
        strategy_on(surface, bounds, trials=14)


def test_every_strategy_of_the_settings_is_in_the_table():
    assert set(STRATEGIES) == set(get_args(config.Search.model_fields["strategy"].annotation))
    assert isinstance(strategy_on(SyntheticSurface(3, seed=0)), MergeMix)


# ---- how good it is ----


@pytest.mark.parametrize(
    ("domains", "trials", "mean_regret", "worst_regret"),
    [(3, 24, 0.3, 0.5), (5, 24, 0.5, 0.8), (7, 40, 0.4, 0.6)],
)
def test_the_recommended_mixture_is_near_the_optimum(domains, trials, mean_regret, worst_regret):
    # Points of mean accuracy; a measurement has a standard error of 1.2 of them, and the uniform
    # mixture a regret of 3.3, 2.4, 1.4 and 1.1 for 3, 4, 5 and 7 domains.
    regrets = []
    for seed in range(3):
        surface = SyntheticSurface(domains, seed)
        strategy = strategy_on(surface, trials=trials)
        search(surface, strategy, seed=seed)
        mixture = to_vector(strategy.recommend().mixture, surface.domains)
        regrets.append(100 * (surface.optimum - surface.utility(mixture)))
    assert np.mean(regrets) < mean_regret
    assert np.max(regrets) < worst_regret
