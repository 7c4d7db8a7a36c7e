"""Replicas that score candidates of their own: the same journal, whoever measured what, and when.

Ranks are threads here; real ones are in ``tests/distributed/test_replicas.py``.
"""

from __future__ import annotations

import dataclasses
import random
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mergemix.errors import EvaluationError, SearchError
from megatron_mergemix.search.journal import Journal, read_journal
from megatron_mergemix.search.loop import run_search
from megatron_mergemix.search.strategy import Proposal
from megatron_mergemix.search.waves import Divided, Waves
from megatron_mergemix.trials import Minibatch, Score, Scores, Trial
from tests.support.threads_as_ranks import Clock, ThreadRanks, ThreadReplicas
from tests.unit.search.test_loop import Planned, merge_weights, proposal

WARM_UP = 0.5
"""Seconds that the first candidate of a job takes on top."""


class World:
    """Proxy and evaluator of one rank; its scores tell which mixture it was merged to."""

    def __init__(
        self,
        replicas: ThreadReplicas | None,
        fails: Collection[int] = (),
        clock: Clock | None = None,
        costs: tuple[float, float] = (1.0, 1.0),
        delay: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.replicas = replicas
        self.fails = {
            round(merge_weights(proposal(index).mixture)["expert a"], 9) for index in fails
        }
        self.clock = clock
        self.costs = costs
        self.delay = delay
        self.measured: list[tuple[int, bool]] = []
        self.applied: Mapping[str, float] = {}

    def apply(self, merge_weights: Mapping[str, float]) -> float:
        self.applied = merge_weights
        return sum(value * value for value in merge_weights.values()) ** 0.5

    def sequence_losses(self, sequences, micro_batch_size):
        raise AssertionError("not by the loop")

    def evaluate(self, proxy: World) -> Scores:
        is_apart = self.replicas is not None and self.replicas.is_apart
        weight = self.applied["expert a"]
        self.measured.append((round(weight * 5), is_apart))
        if self.clock is not None:
            warm_up = WARM_UP if len(self.measured) == 1 else 0.0
            self.clock.advance(self.costs[is_apart] + warm_up)
        time.sleep(self.delay())
        if round(weight, 9) in self.fails:
            raise EvaluationError(f"weight {weight} went wrong.")
        return {"web": {"loss": Score(weight, 0.1, 8, "nats/token", False)}}

    def evaluate_first(self, proxy: World) -> Scores:
        return self.evaluate(proxy)

    def evaluate_others(self, proxy: World, begun: Scores) -> Scores:
        return self.evaluate(proxy)


def batches_of(sizes: Sequence[int], on_a_share: Collection[int] = ()) -> list[list[Proposal]]:
    indices = iter(range(sum(sizes)))
    batches = [[proposal(next(indices)) for _ in range(size)] for size in sizes]
    return [
        [dataclasses.replace(p, first=0.25 if p.index in on_a_share else None) for p in batch]
        for batch in batches
    ]


def search(
    sizes: Sequence[int],
    count: int,
    divided: Divided,
    fails: Collection[int] = (),
    costs: tuple[float, float] = (1.0, 1.0),
    delay: Callable[[], float] = lambda: 0.0,
    before: Sequence[Trial] = (),
    on_a_share: Collection[int] = (),
) -> tuple[list[Trial], list[World], list[None | Exception], Planned]:
    """Search with ``count`` replicas; return the journal's trials without their seconds."""
    ranks = ThreadRanks(count)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trials.jsonl"
        journal = Journal(path, {})
        for trial in before:
            journal.append(trial)
        strategy = Planned(*batches_of(sizes, on_a_share))
        worlds: dict[int, World] = {}

        def body(replicas: ThreadReplicas) -> None:
            world = World(replicas, fails, ranks.clock, costs, delay)
            worlds[replicas.own] = world
            first = replicas.own == 0
            run_search(
                strategy if first else None,
                journal if first else None,
                world,
                world,
                merge_weights,
                replicas=replicas,
                divided=divided,
            )
            assert world.applied == {}, "the search leaves the base"

        ends = ranks.run(body)
        trials = [dataclasses.replace(t, seconds={}) for t in read_journal(path)[1]]
        assert sorted(worlds) == list(range(count))
        return trials, [worlds[number] for number in range(count)], ends, strategy


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    count=st.integers(2, 5),
    divided=st.sampled_from(["auto", "candidates", "requests"]),
    costs=st.tuples(st.sampled_from([0.1, 1.0]), st.sampled_from([0.1, 1.0])),
    fails=st.sets(st.integers(0, 20), max_size=8),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_order_in_which_replicas_finish_does_not_matter(
    sizes: list[int],
    count: int,
    divided: Divided,
    costs: tuple[float, float],
    fails: set[int],
    seed: int,
) -> None:
    """Journal, what the strategy is told, and how the search ends are those of one replica."""
    rng = random.Random(seed)
    alone, _, [end], told = search(sizes, 1, "auto", fails)
    found, _, ends, told_too = search(
        sizes, count, divided, fails, costs, lambda: rng.choice([0.0, 0.0, 0.001])
    )
    assert found == alone
    assert told_too.told == told.told
    assert [str(each) for each in ends] == [str(end)] * count
    assert all(isinstance(each, SearchError | None) for each in ends)


@settings(max_examples=20, deadline=None)
@given(
    kept=st.integers(0, 12),
    count=st.integers(2, 4),
    fails=st.sets(st.integers(0, 12), max_size=2),
)
def test_a_search_killed_anywhere_in_a_wave_ends_with_the_same_trials(
    kept: int, count: int, fails: set[int]
) -> None:
    whole = search([5, 7], count, "candidates", fails)[0]
    assert len(whole) == 12
    resumed, worlds, ends, _ = search([5, 7], count, "candidates", fails, before=whole[:kept])
    assert resumed == whole
    assert ends == [None] * count
    again = [index for world in worlds for index, _ in world.measured]
    assert sorted(again) == list(range(kept, 12)), "nothing is measured twice"


def test_every_replica_measures_its_own_candidate_of_a_wave() -> None:
    _, worlds, _, _ = search([8], 3, "candidates")
    assert [world.measured for world in worlds] == [
        [(0, True), (3, True), (6, True)],
        [(1, True), (4, True), (7, True)],
        [(2, True), (5, True)],
    ]


def test_replicas_that_share_requests_measure_every_candidate() -> None:
    _, worlds, _, _ = search([4], 2, "requests")
    assert [world.measured for world in worlds] == [[(index, False) for index in range(4)]] * 2


def test_auto_compares_candidates_on_a_share_of_the_items_with_their_like(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Here there is no full wave of whole candidates, which alone would never be decided."""
    _, worlds, _, _ = search([8], 3, "auto", costs=(0.5, 0.9), on_a_share=range(2, 8))
    shared, apart = [(0, False), (1, False), (2, False)], [(3, True)]
    assert worlds[0].measured[:4] == [*shared, *apart]
    assert worlds[0].measured[4:] == [(6, True)]
    assert "each scores candidates of its own: 0.30 s per candidate" in capsys.readouterr().out


def test_auto_times_one_shared_candidate_and_one_wave_then_takes_the_faster(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The very first candidate counts for neither: it is slow, whichever way it goes."""
    _, worlds, _, _ = search([9], 2, "auto", costs=(0.5, 0.8))
    shared, apart = [(0, False), (1, False)], [(2, True), (4, True), (6, True)]
    assert worlds[0].measured == [*shared, *apart, (8, False)]
    assert capsys.readouterr().out == (
        "search: 2 replicas, each scores candidates of its own: 0.40 s per candidate, 0.50 s "
        "when they share one\n"
    )
    _, worlds, _, _ = search([9], 2, "auto", costs=(0.3, 0.8))
    one_wave = [*shared, (2, True)]
    assert worlds[0].measured == [*one_wave, *((index, False) for index in range(4, 9))]
    assert capsys.readouterr().out == (
        "search: 2 replicas share every candidate: 0.30 s per candidate, 0.40 s when each scores "
        "its own\n"
    )


@pytest.mark.parametrize(("shared", "is_apart"), [(0.55, True), (0.45, False)])
def test_a_wave_that_is_not_whole_goes_the_faster_way_too(shared: float, is_apart: bool) -> None:
    """Two candidates on four replicas: one pass of 1 s, or twice ``shared``."""
    _, worlds, _, _ = search([2, 4, 2], 4, "auto", costs=(shared, 1.0))
    last_two = [(i, is_apart) for world in worlds[:2] for i, _ in world.measured if i >= 6]
    assert sorted(set(last_two)) == [(6, is_apart), (7, is_apart)]
    assert all((index, is_apart) in worlds[0].measured for index, is_apart in last_two[:1])


def test_a_search_that_asks_for_one_mixture_at_a_time_shares_it() -> None:
    _, worlds, _, _ = search([1] * 5, 2, "auto", costs=(1.0, 0.1))
    assert [world.measured for world in worlds] == [[(index, False) for index in range(5)]] * 2


def test_failed_candidates_are_no_measure_of_time() -> None:
    _, worlds, _, _ = search([8], 2, "auto", fails=[1, 4], costs=(0.5, 0.8))
    assert worlds[0].measured == [
        *[(0, False), (1, False), (2, False)],  # 1 failed: 2 is the shared one that is timed
        *[(3, True), (5, True)],  # 4 failed: the next wave is timed
        (7, False),
    ]


def test_the_others_of_a_wave_stand_when_one_fails() -> None:
    trials, _, ends, _ = search([6], 3, "candidates", fails=[1, 3])
    assert [trial.error is None for trial in trials] == [True, False, True, False, True, True]
    assert ends == [None] * 3


def test_three_failures_in_a_row_end_all_ranks_and_later_ones_of_the_wave_are_dropped() -> None:
    trials, _, ends, _ = search([8], 4, "candidates", fails=[3, 4, 5])
    assert [trial.index for trial in trials] == [0, 1, 2, 3, 4, 5]
    for end in ends:
        assert isinstance(end, SearchError)
        assert "3 candidates failed in a row; the last: weight 1.0 went wrong." in str(end)


def test_mixtures_that_need_gradients_are_never_measured_apart() -> None:
    minibatch = Minibatch(0, 0.5, 0, ("math",))
    asked = [proposal(0), dataclasses.replace(proposal(1), minibatch=minibatch), proposal(2)]
    ranks = ThreadRanks(2)
    seen: list[tuple[int, int, bool]] = []

    def body(replicas: ThreadReplicas) -> list[int]:
        def measure(wanted: Proposal) -> Trial:
            seen.append((wanted.index, replicas.own, replicas.is_apart))
            return Trial(wanted.index, wanted.purpose, wanted.mixture, {}, {})

        return [trial.index for trial in Waves(measure, replicas, "candidates").measure(asked)]

    assert ranks.run(body) == [[0, 1, 2]] * 2
    assert sorted(seen) == [(0, 0, True), (1, 0, False), (1, 1, False), (2, 0, True)]


def test_what_the_settings_decide_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    for divided, how in (
        ("candidates", ", each scores candidates of its own"),
        ("requests", " share every candidate"),
    ):
        search([3], 2, divided)  # type: ignore[arg-type]
        expected = f"search: 2 replicas{how}: as search.replicas says\n"
        assert capsys.readouterr().out == expected


def test_a_single_replica_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    search([3], 1, "auto")
    assert capsys.readouterr().out == ""


def test_an_unexpected_error_of_one_replica_leaves_at_once_without_waiting_for_the_others() -> None:
    """Ranks of its own replica may wait for it: only the end of the process frees them."""
    ranks = ThreadRanks(1)

    def body(replicas: ThreadReplicas) -> None:
        def measure(wanted: Proposal) -> Trial:
            raise RuntimeError("a bug")

        replicas.count = 2  # the other one never comes
        list(Waves(measure, replicas, "candidates").measure([proposal(0), proposal(1)]))

    [end] = ranks.run(body)
    assert isinstance(end, RuntimeError)
