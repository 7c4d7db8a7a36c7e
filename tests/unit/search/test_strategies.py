"""What holds for every strategy: the simplex, the constraints, replay, order, failures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_mergemix import config
from megatron_mergemix.config import evaluate as config_evaluate
from megatron_mergemix.errors import ConfigError, SearchError
from megatron_mergemix.evaluate.utility import Utility
from megatron_mergemix.mixtures.simplex import Bounds, to_vector, whole_simplex, within
from megatron_mergemix.search.make import STRATEGIES, make_strategy
from megatron_mergemix.search.strategy import Proposal
from megatron_mergemix.synthetic.surfaces import SyntheticSurface

TRIALS = 14
NAMES = sorted(STRATEGIES)
POINTS = [{"domain0": 0.2, "domain1": 0.3, "domain2": 0.5}, {"domain1": 0.6, "domain2": 0.4}]


def strategy_on(surface, name, bounds=None, **more):
    num_domains = len(surface.domains)
    if name == "fixed":
        more.setdefault("points", POINTS)
    else:
        more.setdefault("trials", TRIALS)
    return make_strategy(
        config.Search(strategy=name, **{"surrogate": "gp", **more}),
        domains=surface.domains,
        utility=Utility(
            config_evaluate.Utility(normalize="none"),
            {name: ["accuracy"] for name in surface.capabilities},
        ),
        bounds=bounds or whole_simplex(num_domains),
        proportional=np.arange(1, num_domains + 1) / np.arange(1, num_domains + 1).sum(),
    )


def search(surface, strategy, seed=0, failing=()):
    trials = []
    while not strategy.done():
        for proposal in strategy.ask():
            trial = surface.measure(proposal, 300, seed)
            if proposal.index in failing:
                trial = replace(trial, scores={}, error="the evaluation ran out of memory")
            trials.append(trial)
        strategy.tell(trials)
    return trials


def asked(strategy):
    return [(p.index, p.purpose, dict(p.mixture)) for p in strategy.ask()]


@pytest.fixture(scope="module", params=NAMES)
def finished(request):
    surface = SyntheticSurface(3, seed=0, num_capabilities=2)
    strategy = strategy_on(surface, request.param)
    return surface, request.param, strategy, search(surface, strategy)


def test_trials_are_numbered_through_and_begin_with_base_vertices_and_priors(finished):
    _, _, _, trials = finished
    assert [trial.index for trial in trials] == list(range(len(trials)))
    purposes = [trial.purpose for trial in trials[:6]]
    assert purposes == ["base", *["vertex"] * 3, "prior:uniform", "prior:proportional"]


def test_no_strategy_takes_more_trials_than_it_has(finished):
    surface, name, strategy, trials = finished
    explored = [t for t in trials[1:] if not t.purpose.startswith("verify:")]
    assert len(explored) <= strategy.settings.num_trials(3)
    if name in ("mergemix", "iterative", "bayesian", "optuna"):
        assert len(explored) == TRIALS


def test_no_mixture_is_measured_twice(finished):
    surface, _, _, trials = finished
    points = np.array([to_vector(trial.mixture, surface.domains) for trial in trials[1:]])
    apart = np.abs(points[:, None] - points[None]).max(axis=2) + np.eye(len(points))
    assert apart.min() > 1e-6


def test_a_search_recommends_something_near_the_optimum(finished):
    surface, name, strategy, _ = finished
    mixture = to_vector(strategy.recommend().mixture, surface.domains)
    regret = 100 * (surface.optimum - surface.utility(mixture))
    assert regret < (2.5 if name == "fixed" else 1.0)


def test_every_prefix_of_the_journal_asks_for_what_came_next(finished):
    surface, name, strategy, trials = finished
    design = strategy._num_designed
    middle = (design + len(trials)) // 2
    for end in sorted({0, 1, design - 1, design, design + 1, middle, len(trials) - 1}):
        strategy = strategy_on(surface, name)
        strategy.tell(trials[:end])
        index, _, mixture = asked(strategy)[0]
        assert index == end
        assert mixture == pytest.approx(dict(trials[end].mixture), abs=1e-9)


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_neither_order_nor_the_way_of_telling_decides_what_is_asked(finished, data):
    surface, name, _, trials = finished
    end = data.draw(st.integers(0, len(trials)))
    at_once, in_parts = strategy_on(surface, name), strategy_on(surface, name)
    at_once.tell(data.draw(st.permutations(trials[:end])))
    for part in sorted({data.draw(st.integers(0, end)) for _ in range(2)} | {end}):
        in_parts.tell(trials[:part][::-1])
    assert asked(at_once) == asked(in_parts)


def test_two_searches_of_one_seed_are_the_same_search(finished):
    surface, name, _, trials = finished
    again = search(surface, strategy_on(surface, name))
    assert [dict(trial.mixture) for trial in again] == [dict(trial.mixture) for trial in trials]


def test_later_rounds_are_taken_from_the_journal_as_they_were_measured(finished):
    surface, name, _, trials = finished
    later = [t.index for t in trials if t.purpose.startswith(("round:", "gradient:"))]
    if not later:
        assert name in ("mergemix", "grid", "fixed")
        return
    moved = {"domain0": 0.11, "domain1": 0.22, "domain2": 0.67}
    told = [replace(t, mixture=moved) if t.index == later[0] else t for t in trials[: later[0] + 1]]
    strategy = strategy_on(surface, name)
    strategy.tell(told)  # another machine may have rounded a fit differently
    assert all(proposal.index != later[0] for proposal in strategy.ask())


def test_failed_trials_are_left_out_and_priors_asked_once_more(finished):
    surface, name, _, _ = finished
    strategy = strategy_on(surface, name)
    trials = search(surface, strategy, failing=(5,))
    assert len({trial.index for trial in trials}) == len(trials)
    assert trials[5].purpose == "prior:proportional"
    assert sum(trial.purpose == "prior:proportional" for trial in trials) == 2
    assert strategy.recommend().notes[0].endswith("trials failed and were left out: 5.")


@pytest.mark.parametrize("name", ["bayesian", "iterative"])
def test_a_mixture_that_failed_is_not_proposed_again(name):
    surface = SyntheticSurface(3, seed=0, num_capabilities=2)
    best = surface.measure(Proposal(0, "", dict.fromkeys(surface.domains, 1 / 3)), 300, 0)
    inflated = {
        n: {m: replace(s, value=s.value + 5) for m, s in v.items()} for n, v in best.scores.items()
    }
    strategy, trials = strategy_on(surface, name, trials=24), []
    while not strategy.done():
        for proposal in strategy.ask():
            trial = surface.measure(proposal, 300, 0)
            share = proposal.mixture.get("domain2", 0.0)
            if share > 0.9:
                trial = replace(trial, scores={}, error="not finite")
            elif share > 0.5:  # which makes the corner that fails look best
                trial = replace(trial, scores=inflated)
            trials.append(trial)
        strategy.tell(trials)
    failed = [to_vector(t.mixture, surface.domains) for t in trials if t.error]
    later = [t for t in trials if t.purpose.startswith("round:")]
    assert later
    for trial in later:
        before = [t for t in trials[: trial.index] if t.error]
        assert all(trial.mixture != other.mixture for other in before)
    assert failed


def test_a_journal_of_another_kind_is_refused_though_its_mixtures_are_the_same(finished):
    surface, name, _, trials = finished
    for purpose in ("leaves/vertex", "verify:last"):
        strategy = strategy_on(surface, name)
        with pytest.raises(
            SearchError, match="belongs to other domains, tokens, bounds, or settings"
        ):
            strategy.tell([*trials[:1], replace(trials[1], purpose=purpose), *trials[2:4]])


def test_a_verified_optimum_stays_though_another_machine_rounds_its_fit_differently(
    finished, monkeypatch
):
    surface, name, strategy, trials = finished
    told, candidates = strategy_on(surface, name), type(strategy).candidates

    def moved(self, surface):
        return [
            candidate._replace(mixture=candidate.mixture + 1e-4 * np.array([1, -1, 0]))
            for candidate in candidates(self, surface)
        ]

    monkeypatch.setattr(type(strategy), "candidates", moved)
    told.tell(trials)
    assert told.ask() == []
    assert told.recommend().mixture == strategy.recommend().mixture


def test_a_design_of_which_too_much_failed_ends_the_search_at_once():
    surface = SyntheticSurface(7, seed=0, num_capabilities=2)
    strategy = strategy_on(surface, "gradient", steps=8)

    def answers():
        for proposal in strategy.ask():
            trial = surface.measure(proposal, 300, 0)
            is_broken = 1.0 in (proposal.mixture.get("domain0"), proposal.mixture.get("domain1"))
            yield replace(trial, scores={}, error="out of memory") if is_broken else trial

    trials = list(answers())
    strategy.tell(trials)
    again = list(answers())
    assert [trial.purpose for trial in again] == ["vertex", "vertex"]
    with pytest.raises(SearchError, match=r"8 of the 12 mixtures .* needs 9 .* trial 1: out of"):
        strategy.tell([*trials, *again])


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=5, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    low=st.floats(0, 0.1),
    high=st.floats(0.6, 1.0),
    floor=st.sampled_from([0.0, 0.08]),
)
def test_every_asked_and_recommended_mixture_obeys_the_constraints(name, seed, low, high, floor):
    surface = SyntheticSurface(3, seed=1, num_capabilities=2)
    bounds = Bounds(np.array([low, 0.0, 0.0]), np.array([high, 1.0, high]), floor)
    inside = {"points": [{"domain0": 0.3, "domain1": 0.3, "domain2": 0.4}]}
    more = inside if name == "fixed" else {"seed": seed, "trials": 12}
    strategy = strategy_on(surface, name, bounds, **more)
    trials = search(surface, strategy, seed)
    mixtures = [trial.mixture for trial in trials[1:]] + [strategy.recommend().mixture]
    points = np.array([to_vector(mixture, surface.domains) for mixture in mixtures])
    assert within(points, bounds).all()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "fixed"])
@pytest.mark.parametrize("num_domains", [2, 15])
def test_few_and_many_domains_are_searched_within_the_constraints(name, num_domains):
    surface = SyntheticSurface(num_domains, seed=0, num_capabilities=2)
    low, high = np.zeros(num_domains), np.full(num_domains, 0.9)
    low[0] = 0.05
    bounds = Bounds(low, high, 0.02)
    strategy = strategy_on(surface, name, bounds, trials=num_domains + 7)
    trials = search(surface, strategy)
    mixtures = [trial.mixture for trial in trials[1:]] + [strategy.recommend().mixture]
    points = np.array([to_vector(mixture, surface.domains) for mixture in mixtures])
    assert within(points, bounds).all()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("fixed", "gradient")])
def test_too_few_trials_are_refused_before_anything_is_measured(name):
    with pytest.raises(ConfigError, match="expected at least"):
        strategy_on(SyntheticSurface(7, seed=0), name, trials=8)


def test_messages_about_too_few_trials_name_the_setting_that_gives_them():
    surface = SyntheticSurface(4, seed=0)
    with pytest.raises(ConfigError, match=r"search\.rounds\[0\] is 5; expected at least 6"):
        strategy_on(surface, "iterative", rounds=[5, 35], trials=40)
    with pytest.raises(ConfigError, match=r"at least 15, .*domains\. Use another search.surrogate"):
        strategy_on(surface, "gradient", surrogate="quadratic")  # whose trials are given
    with pytest.raises(ConfigError, match=r"bounds and search\.min_share leave room for"):
        strategy_on(surface, "mergemix", Bounds(np.zeros(4), np.ones(4), 0.5), trials=40)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "mergemix" else pytest.mark.nightly)
        for name in NAMES
        if name != "fixed"
    ],
)
def test_a_divergence_from_the_prior_pulls_the_recommendation_towards_it(name):
    surface = SyntheticSurface(3, seed=0)
    distances = []
    for kl in (0.0, 0.3, 30.0):
        strategy = strategy_on(surface, name, kl=kl)
        search(surface, strategy)
        mixture = to_vector(strategy.recommend().mixture, surface.domains)
        distances.append(np.abs(mixture - np.array([1, 2, 3]) / 6).max())
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 0.02


def test_a_given_mixture_outside_the_bounds_is_refused():
    bounds = Bounds(np.zeros(3), np.array([1.0, 1.0, 0.4]))
    with pytest.raises(ConfigError, match=r"search\.points\.0 lies outside"):
        strategy_on(SyntheticSurface(3, seed=0), "fixed", bounds)


def test_without_optuna_the_strategy_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'megatron-mergemix\[optuna\]'"):
        strategy_on(SyntheticSurface(3, seed=0), "optuna")


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random"])
def test_every_sampler_of_optuna_proposes_mixtures(sampler):
    surface = SyntheticSurface(3, seed=0)
    strategy = strategy_on(surface, "optuna", sampler=sampler)
    trials = search(surface, strategy)
    rounds = [trial for trial in trials if trial.purpose.startswith("round:")]
    assert len(rounds) == TRIALS - 7


@pytest.mark.parametrize("first_share", [1.0, 0.5])
def test_what_optuna_proposes_counts_for_the_surrogate_which_learns_at_the_end(first_share):
    surface = SyntheticSurface(4, seed=0)
    few = {"surrogate": "quadratic", "sampler": "random", "first_share": first_share}
    strategy = strategy_on(surface, "optuna", trials=16, **few)
    trials = search(surface, strategy, failing=(7,))
    assert strategy.recommend().mixture
    assert sum(t.error is None and not t.purpose.startswith("verify:") for t in trials) > 15
    with pytest.raises(ConfigError, match=r"first fits a surrogate to 14 .* Raise search\.trials"):
        strategy_on(surface, "optuna", trials=14, **few)


def test_no_more_of_optunas_trials_may_fail_than_the_surrogate_can_spare():
    surface = SyntheticSurface(4, seed=0)
    strategy = strategy_on(surface, "optuna", trials=16, surrogate="quadratic", sampler="random")
    with pytest.raises(SearchError, match=r"needs 15 for 4 domains"):
        search(surface, strategy, failing=(7, 9))


def test_the_rounds_of_an_iterative_search_have_the_sizes_that_were_asked_for():
    strategy = strategy_on(SyntheticSurface(3, seed=0), "iterative", rounds=[8, 4, 2])
    purposes = [t.purpose for t in search(SyntheticSurface(3, seed=0), strategy)]
    assert [purposes.count(f"round:{n}") for n in (2, 3, 4)] == [4, 2, 0]
    halved = strategy_on(SyntheticSurface(3, seed=0), "iterative", trials=112)
    assert halved.sizes() == [64, 32, 16]


def test_a_journal_of_another_strategy_is_refused():
    surface = SyntheticSurface(3, seed=0)
    trials = search(surface, strategy_on(surface, "bayesian"))
    with pytest.raises(SearchError, match="belongs to other"):
        strategy_on(surface, "mergemix").tell(trials)


def test_fixed_asks_for_its_points_and_grid_for_a_lattice():
    surface = SyntheticSurface(3, seed=0)
    wanted = [to_vector({"domain0": 0.0, **point}, surface.domains) for point in POINTS]
    points = [p for p in strategy_on(surface, "fixed").ask() if p.purpose == "point"]
    found = [to_vector(proposal.mixture, surface.domains) for proposal in points]
    np.testing.assert_allclose(found, wanted)

    asked = strategy_on(surface, "grid", trials=17).ask()
    lattice = [to_vector(p.mixture, surface.domains) for p in asked if p.purpose == "lattice"]
    np.testing.assert_allclose(4 * np.array(lattice), np.round(4 * np.array(lattice)), atol=1e-9)
    # Of the fifteen points with step 1/4 three are domains alone; uniform is none of them.
    assert len(lattice) == 12
    assert len({tuple(np.round(point, 6)) for point in lattice}) == 12
