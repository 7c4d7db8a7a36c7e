"""Racing: who is scored on what, in which order, and that a journal leads to the same again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from megatron_mergemix import config
from megatron_mergemix.config import evaluate as config_evaluate
from megatron_mergemix.evaluate.utility import Utility
from megatron_mergemix.mixtures.simplex import to_vector, whole_simplex
from megatron_mergemix.search.calibration import utility_scale
from megatron_mergemix.search.first_share import on_all_items
from megatron_mergemix.search.make import make_strategy
from megatron_mergemix.search.racing import KEPT, chances_to_win, told_of_optimum
from megatron_mergemix.search.strategy import Strategy
from megatron_mergemix.synthetic.items import Items
from megatron_mergemix.synthetic.surfaces import SyntheticSurface
from megatron_mergemix.trials import Trial

SHARE, ITEMS = 0.25, 200
TRIALS = 16
NAMES = ("mergemix", "iterative", "fixed")
POINTS = [{"domain0": a / 9, "domain1": (8 - a) / 9, "domain2": 1 / 9} for a in range(1, 8)]
SURFACE = SyntheticSurface(3, seed=1, num_capabilities=2)


def strategy_of(name: str = "mergemix", normalize: str = "vertices", **more) -> Strategy:
    more = {"first_share": SHARE, "trials": TRIALS, **more}
    if name == "fixed":
        more |= {"points": POINTS}
        more.pop("trials")
    metrics = {capability: ["accuracy"] for capability in SURFACE.capabilities}
    return make_strategy(
        config.Search(strategy=name, surrogate="gp", **more),
        domains=SURFACE.domains,
        utility=Utility(config_evaluate.Utility(normalize=normalize), metrics),
        bounds=whole_simplex(3),
        proportional=np.array([0.5, 0.3, 0.2]),
    )


def search(
    strategy: Strategy,
    failing: Sequence[int] = (),
    in_common: float = 0.5,
    surface: SyntheticSurface = SURFACE,
) -> list[Trial]:
    items, trials = Items(surface, 0, in_common, ITEMS), []
    while not strategy.done():
        for proposal in strategy.ask():
            trial = items.measure(proposal)
            if proposal.index in failing:
                trial = replace(trial, scores={}, error="it ran out of memory")
            trials.append(trial)
        strategy.tell(trials)
    return trials


def asked(strategy: Strategy) -> list[tuple]:
    return [(p.index, p.purpose, dict(p.mixture), p.first, p.begun) for p in strategy.ask()]


@pytest.fixture(scope="module", params=NAMES)
def finished(request) -> tuple[str, Strategy, list[Trial]]:
    strategy = strategy_of(request.param)
    return request.param, strategy, search(strategy)


def test_anchors_and_verified_candidates_are_scored_on_all_items_at_once(finished) -> None:
    for trial in finished[2]:
        (samples,) = {m["accuracy"].num_samples for m in trial.scores.values()}
        whole = trial.purpose in ("base", "vertex") or trial.purpose.startswith(
            ("prior:", "verify:", "race:")
        )
        assert trial.first == (None if whole else SHARE), trial.purpose
        assert samples == (ITEMS if whole else SHARE * ITEMS)


def test_what_races_was_begun_and_keeps_the_items_that_it_had(finished) -> None:
    trials = finished[2]
    begun = {tuple(t.mixture.values()): t for t in trials if t.first is not None}
    raced = [t for t in trials if t.purpose.startswith("race:")]
    assert len({tuple(t.mixture.values()) for t in raced}) == len(raced)
    assert KEPT * len(begun) <= len(raced) < len(begun)
    for trial in raced:
        before = begun[tuple(trial.mixture.values())]
        assert before.index < trial.index
        for capability, metrics in trial.scores.items():
            items = metrics["accuracy"].items
            assert items[: int(SHARE * ITEMS)] == before.scores[capability]["accuracy"].items


def test_waves_are_numbered_and_end_before_the_next_round(finished) -> None:
    waves = [t.purpose for t in finished[2] if t.purpose.startswith("race:")]
    numbers = [int(purpose.removeprefix("race:")) for purpose in waves]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(1, numbers[-1] + 1))
    assert numbers[-1] > 1


def test_every_prefix_of_the_journal_asks_for_what_came_next(finished) -> None:
    name, _, trials = finished
    race = next(trial.index for trial in trials if trial.purpose.startswith("race:"))
    for end in (3, race - 1, race, race + 1, race + 3, len(trials) - 1):
        strategy = strategy_of(name)
        strategy.tell(trials[:end][::-1])
        (index, purpose, mixture, first, _), *_ = asked(strategy)
        expected = trials[end]
        assert (index, purpose, first) == (end, expected.purpose, expected.first)
        assert mixture == pytest.approx(dict(expected.mixture), abs=1e-9)


def test_the_way_of_telling_does_not_decide_what_is_asked(finished) -> None:
    name, _, trials = finished
    race = next(t.index for t in trials if t.purpose.startswith("race:"))
    at_once, in_parts = strategy_of(name), strategy_of(name)
    at_once.tell(trials[: race + 1])
    for end in (2, race - 1, race, race + 1):
        in_parts.tell(trials[:end])
    assert asked(at_once) == asked(in_parts)
    if name == "mergemix":  # whose first wave is larger than one
        assert all(begun is not None for *_, begun in asked(at_once))


def test_the_recommended_mixture_was_scored_on_all_items(finished) -> None:
    _, strategy, trials = finished
    advice = strategy.recommend()
    by_index = {trial.index: trial for trial in trials}
    assert advice.items == "new items"
    for name, row in advice.alternatives.items():
        trial = by_index[row["trial"]]
        assert trial.first is None, name
        assert row["mixture"] == trial.mixture


def test_a_wave_is_taken_from_the_journal_as_it_was_measured() -> None:
    """Another machine may round a fit differently and let others race."""
    trials = search(strategy_of())
    first = next(t.index for t in trials if t.purpose == "race:1")
    strategy = strategy_of()
    strategy.tell(trials[:first])
    wave = [proposal.mixture for proposal in strategy.ask()]
    other = next(t for t in trials if t.first is not None and t.mixture not in wave)
    told = [*trials[:first], replace(trials[first], mixture=other.mixture)]
    strategy = strategy_of()
    strategy.tell(told)
    left = [proposal.mixture for proposal in strategy.ask()]
    assert left == wave[:-1]
    assert other.mixture not in left


def test_who_fails_in_the_race_keeps_its_first_share_and_does_not_race_again() -> None:
    race = next(t.index for t in search(strategy_of()) if t.purpose == "race:1")
    strategy = strategy_of()
    trials = search(strategy, failing=[race])
    failed = trials[race]
    same = [t for t in trials if t.mixture == failed.mixture and t.index != race]
    assert [t.first for t in same] == [SHARE]
    assert strategy.recommend().notes[0].endswith(f"left out: {race}.")


def test_the_best_of_the_design_races_where_items_tell_them_apart() -> None:
    trials = search(strategy_of(), in_common=0.97)
    begun = [t for t in trials if t.first is not None]
    points = np.array([to_vector(t.mixture, SURFACE.domains) for t in begun])
    best = begun[int(np.argmax(SURFACE.utility(points)))]
    assert any(t.mixture == best.mixture for t in trials if t.purpose == "race:1")


def test_racing_keeps_the_optimum_within_the_noise_of_a_candidate() -> None:
    """Over some surfaces; ``tools/bench_racing.py`` has more of them, and the price."""
    lost, errors, items = [], [], []
    for seed in range(4):
        surface = SyntheticSurface(3, seed=seed, num_capabilities=2)
        metrics = {capability: ["accuracy"] for capability in surface.capabilities}
        regrets, measured = [], []
        for share in (1.0, SHARE):
            strategy = make_strategy(
                config.Search(surrogate="gp", first_share=share, trials=24),
                domains=surface.domains,
                utility=Utility(config_evaluate.Utility(normalize="none"), metrics),
                bounds=whole_simplex(3),
                proportional=np.array([0.5, 0.3, 0.2]),
            )
            trials = search(strategy, in_common=0.9, surface=surface)
            advice = strategy.recommend()
            mixture = to_vector(advice.mixture, surface.domains)
            regrets.append(surface.optimum - surface.utility(mixture))
            measured.append(sum(_new_items(trial) for trial in trials))
            errors.append(advice.utility_stderr)
        lost.append(regrets[1] - regrets[0])
        items.append(measured[1] / measured[0])
    assert np.mean(lost) < 0.25 * np.mean(errors)
    assert np.max(lost) < np.mean(errors)
    assert np.max(items) < 0.8


def _new_items(trial: Trial) -> float:
    """Return the items that a trial was scored on, those left out that it had been scored on."""
    return ITEMS * (1 - SHARE if trial.purpose.startswith("race:") else trial.first or 1.0)


def test_a_candidate_that_is_surely_worse_has_no_chance_and_the_best_has_one() -> None:
    strategy = strategy_of(normalize="none")
    trials = on_all_items([t for t in search(strategy) if t.mixture])
    points = np.array([to_vector(t.mixture, SURFACE.domains) for t in trials])
    chances = chances_to_win(
        strategy.race_landscape(trials), points, lambda points: np.zeros(len(points)), 0
    )
    assert chances.max() == 1.0
    truth = SURFACE.utility(points)
    assert chances[np.argmin(truth)] < 0.01
    assert truth[np.argmax(chances)] > np.quantile(truth, 0.75)


class Line:
    """A surface that is known but for its slope from one domain to the other."""

    scale = None

    class utility:  # noqa: N801 - a namespace in the place of an object
        @staticmethod
        def combine(values, scale):
            return values[..., 0]

    def optimistic(self, points, deviations):
        return deviations * np.abs(points[:, 0] - 0.5)

    def sample(self, points, num, rng):
        return (rng.normal(size=(num, 1)) * (points[:, 0] - 0.5))[..., None]


def test_what_tells_most_of_the_optimum_is_measured_where_it_decides() -> None:
    points = np.array([[share, 1 - share] for share in (0.5, 0.6, 0.9, 1.0, 0.0)])
    told = told_of_optimum(
        Line(), points, np.full(5, 0.1), whole_simplex(2), lambda p: np.zeros(len(p)), 0
    )
    assert told[0] == 0.0  # wherever the optimum is, the middle stays what it is
    assert told[0] < told[1] < told[2] < told[3]
    assert told[4] == pytest.approx(told[3])
    noisy = told_of_optimum(
        Line(), points, np.full(5, 10.0), whole_simplex(2), lambda p: np.zeros(len(p)), 0
    )
    assert (noisy[1:] < told[1:]).all()


def test_the_scale_is_that_of_the_vertices_on_all_items() -> None:
    trials = search(strategy_of())
    utility = strategy_of().utility
    scale = utility_scale(utility, trials)
    vertices = np.array([utility.measure(t.scores)[0] for t in trials if t.purpose == "vertex"])
    assert scale.zero == pytest.approx(vertices.min(axis=0))
    assert scale.unit == pytest.approx(np.ptp(vertices, axis=0))


def test_a_scale_over_all_trials_takes_every_candidate_once() -> None:
    trials = search(strategy_of(normalize="zscore"))
    utility = strategy_of(normalize="zscore").utility
    scale = utility_scale(utility, trials)
    explored = [t for t in trials[1:] if not t.purpose.startswith("verify:")]
    candidates = on_all_items(explored)
    assert len(candidates) == TRIALS
    values = np.array([utility.measure(t.scores)[0] for t in candidates])
    assert scale.zero == pytest.approx(values.mean(axis=0))


def test_a_first_share_of_one_changes_nothing() -> None:
    whole = search(strategy_of(first_share=1.0))
    assert all(t.first is None and not t.purpose.startswith("race:") for t in whole)
    assert len(whole) <= 1 + TRIALS + 2
