"""What the verdict says of a recommendation, beside which one it is."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from megatron_mergemix.config import evaluate as config_evaluate
from megatron_mergemix.evaluate.utility import Utility
from megatron_mergemix.mixtures.simplex import to_mixture, to_vector, uniform, whole_simplex
from megatron_mergemix.search.calibration import utility_scale
from megatron_mergemix.search.design import design
from megatron_mergemix.search.landscape import Landscape
from megatron_mergemix.search.strategy import Proposal
from megatron_mergemix.search.uncertainty import SURE, Uncertainty
from megatron_mergemix.search.verdict import (
    Candidate,
    _notes_on_priors,
    _notes_on_small_shares,
    give_verdict,
)
from megatron_mergemix.synthetic.surfaces import SyntheticSurface
from megatron_mergemix.trials import Score

PROPORTIONAL = np.array([0.5, 1 / 3, 1 / 6])
BOUNDS = whole_simplex(3)


class World:
    """A measured design of 14 mixtures and one verified candidate near the optimum."""

    def __init__(self, seed=0, num_items=2000, kind="mean", change=lambda trial: trial):
        self.truth = SyntheticSurface(3, seed, num_capabilities=3)
        self.domains = self.truth.domains
        self.utility = Utility(
            config_evaluate.Utility(kind=kind, normalize="none"),
            {name: ["accuracy"] for name in self.truth.capabilities},
        )
        dense = np.random.default_rng(1).dirichlet(np.ones(3), size=4000)
        self.best = dense[np.argmax(self.truth.utility(dense))]
        asked = [("verify:argmax", self.best), *design(BOUNDS, PROPORTIONAL, 14, 0)]
        self.trials = [
            change(self.truth.measure(Proposal(i, purpose, to_mixture(x, self.domains)), num_items))
            for i, (purpose, x) in enumerate(asked, start=1)
        ]

    def verdict(self, others=(), **more):
        designed = self.trials[1:]
        learned = Landscape(
            designed, self.domains, self.utility, utility_scale(self.utility, designed), "gp"
        )
        return give_verdict(
            [Candidate("argmax", "verify:argmax", self.best), *others],
            {"uniform": uniform(3), "proportional": PROPORTIONAL},
            self.trials,
            self.domains,
            BOUNDS,
            learned,
            **more,
        )


def with_items(trial):
    """The same accuracies on 400 items; item i is right where it is easier than the accuracy."""
    scores = {}
    for number, (name, metrics) in enumerate(trial.scores.items()):
        accuracy = metrics["accuracy"].value
        ease = np.random.default_rng(number).permutation((np.arange(400) + 0.5) / 400)
        items = (ease < accuracy).astype(float)
        stderr = float(items.std(ddof=1) / 20)
        scores[name] = {
            "accuracy": Score(float(items.mean()), stderr, 400, "accuracy", True, tuple(items))
        }
    return replace(trial, scores=scores)


@pytest.fixture(scope="module")
def world():
    return World()


def test_the_recommendation_says_how_sure_it_is(world):
    verdict = world.verdict()
    low, high = verdict.interval
    truth = float(world.truth.utility(to_vector(verdict.mixture, world.domains)))
    assert low < truth < high
    assert high - low < 0.02
    assert set(verdict.better_than) <= {"uniform", "proportional", "best observed"}
    # 3 points of accuracy above the uniform mixture, known to a fraction of a point.
    assert verdict.better_than["uniform"] > 0.99
    assert 0 < verdict.as_good["share"] < 0.3
    for name in world.domains:
        share = verdict.mixture[name]
        assert verdict.as_good["least"][name] <= share <= verdict.as_good["largest"][name]
    assert verdict.items == "the search's items"
    assert json.loads(json.dumps(asdict(verdict)))["as_good"] == verdict.as_good


def test_a_favourite_wins_unless_another_is_surely_better(world):
    mean = Candidate("mean", "verify:top-k", PROPORTIONAL)
    noisy = World(num_items=300)
    assert noisy.verdict([mean]).source == "argmax"
    assert noisy.verdict([mean]).better_than["proportional"] < SURE
    assert noisy.verdict([mean], favourite="mean").source == "mean"
    assert world.verdict([mean], favourite="mean").source == "argmax"
    assert world.verdict([mean]).better_than["proportional"] >= SURE


def test_of_one_mixture_under_two_names_the_first_is_told(world):
    twin = Candidate("twin", "verify:argmax", world.best)
    assert world.verdict([twin]).source == "argmax"


def test_a_capability_that_does_not_count_may_rank_as_it_likes():
    def flat(trial):
        first, *_ = trial.scores
        same = {"accuracy": replace(trial.scores[first]["accuracy"], value=0.5)}
        return replace(trial, scores={**trial.scores, first: same})

    world = World(change=flat)
    poor = "ranks left-out trials poorly"
    assert any(poor in note for note in world.verdict().notes)
    weights = {name: float(place > 0) for place, name in enumerate(world.truth.capabilities)}
    settings = config_evaluate.Utility(normalize="none", weights=weights)
    world.utility = Utility(settings, {name: ["accuracy"] for name in world.truth.capabilities})
    assert not any(poor in note for note in world.verdict().notes)


def test_a_favourite_that_was_not_measured_cannot_win(world):
    unknown = Candidate("mean", "verify:top-k", np.array([0.31, 0.32, 0.37]))
    assert world.verdict([unknown], favourite="mean").source == "argmax"


def test_the_draws_are_those_of_the_seed(world):
    assert world.verdict(seed=3) == world.verdict(seed=3)
    assert world.verdict(seed=3).interval != world.verdict(seed=4).interval


def test_with_worst_the_interval_is_that_of_the_worst_capability():
    world = World(kind="worst", seed=1)
    verdict = world.verdict()
    worst = world.truth.accuracies(to_vector(verdict.mixture, world.domains)).min()
    low, high = verdict.interval
    assert low < worst < high
    assert high - low < 0.05


def test_kept_items_make_the_utility_one_on_new_items():
    on_items = World(change=with_items).verdict()
    assert on_items.items == "new items"
    forget = World(
        change=lambda trial: replace(
            with_items(trial),
            scores={
                name: {"accuracy": replace(metrics["accuracy"], items=())}
                for name, metrics in with_items(trial).scores.items()
            },
        )
    ).verdict()
    assert forget.items == "the search's items"
    # Items that all mixtures share hide what other items would do to the level of all of them.
    assert np.diff(on_items.interval)[0] > 2 * np.diff(forget.interval)[0]
    width_of_items = 2 * 1.96 * on_items.utility_stderr
    assert np.diff(on_items.interval)[0] == pytest.approx(width_of_items, rel=0.3)


def test_a_probability_below_95_per_cent_is_noted_with_the_measured_gain():
    sure = Uncertainty((0.0, 1.0), {"uniform": 0.949, "proportional": 0.951}, {}, "new items")
    gains = {"uniform": {"gain": -0.0123, "gain_stderr": 0.02}}
    assert _notes_on_priors({"uniform": uniform(3), "proportional": PROPORTIONAL}, gains, sure) == [
        "The recommended mixture is better than uniform with a probability of only 0.95; it "
        "measured 0.0123 +- 0.02 less."
    ]


def test_where_everything_measures_the_same_nothing_is_surely_better():
    flat = World(num_items=50)
    flat.trials = [replace(trial, scores=flat.trials[4].scores) for trial in flat.trials]
    verdict = flat.verdict()
    doubted = [note for note in verdict.notes if "with a probability of only" in note]
    assert len(doubted) == len([n for n in verdict.better_than if n != "best observed"]) > 0
    assert all("it measured 0" in note for note in doubted)
    assert verdict.as_good["share"] == 1.0


def test_a_recommendation_that_is_a_prior_is_not_compared_with_itself(world):
    verdict = world.verdict(preference=lambda x: -100 * np.abs(x - uniform(3)).sum(axis=1))
    assert verdict.source == "best observed"
    assert list(verdict.mixture.values()) == pytest.approx([1 / 3] * 3)
    assert set(verdict.better_than) == {"proportional"}
    assert "The recommended mixture is the uniform one." in verdict.notes


def test_a_mixture_that_all_but_leaves_domains_out_is_noted(world):
    corner = np.array([1.0, 0.0, 0.0])
    verdict = world.verdict(preference=lambda x: -100 * np.abs(x - corner).sum(axis=1))
    _, second, third = world.domains
    note = f"Less than a fifth of an even share: {second} 0.000, {third} 0.000. Merges are too"
    assert verdict.notes[-1].startswith(note)
    assert _notes_on_small_shares({"a": 0.5, "b": 0.43, "c": 0.07}) == []
    assert len(_notes_on_small_shares({"a": 0.5, "b": 0.44, "c": 0.06})) == 1


def test_a_preference_picks_the_winner_and_enters_every_comparison(world):
    plain = world.verdict()
    corner = np.eye(3)[0]
    strong = world.verdict(preference=lambda x: -10 * np.abs(x - corner).sum(axis=1))
    assert plain.source == "argmax"
    assert strong.mixture == to_mixture(corner, world.domains)
    assert strong.better_than["uniform"] > 0.99
    assert strong.interval[1] < plain.interval[0]  # its utility alone is far lower
    assert strong.as_good["share"] == 0.0
