"""The loop: who is called when, what is on disk by then, and what a failure does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_mergemix.errors import EvaluationError, SearchError
from megatron_mergemix.mixtures.merge_weights import merge_weights as merge_weights_of
from megatron_mergemix.search.journal import Journal, read_journal
from megatron_mergemix.search.loop import run_search
from megatron_mergemix.search.slopes import by_shares
from megatron_mergemix.search.strategy import Proposal, Recommendation
from megatron_mergemix.trials import Minibatch, Score, Scores, Trial

DIGESTS = {"base": "1"}
SCORE = Score(1.5, 0.1, 8, "nats/token", False)


def proposal(index: int) -> Proposal:
    return Proposal(index, f"purpose {index}", {"a": index / 10, "b": 1 - index / 10})


class Planned:
    """Asks for given batches, each once the one before is told."""

    def __init__(self, *batches: Sequence[Proposal]) -> None:
        self.batches = [list(batch) for batch in batches]
        self.told: list[list[int]] = []

    def tell(self, trials: Sequence[Trial]) -> None:
        self.told.append([trial.index for trial in trials])

    def ask(self) -> list[Proposal]:
        known = set(self.told[-1])
        for batch in self.batches:
            if left := [each for each in batch if each.index not in known]:
                return left
        return []

    def done(self) -> bool:
        return not self.ask()

    def recommend(self) -> Recommendation:
        raise AssertionError("the loop does not draw conclusions")


class World:
    """Proxy and evaluator in one, which writes down what happens to it."""

    def __init__(self, path: Path, fails: Callable[[int], bool] = lambda call: False) -> None:
        self.path = path
        self.fails = fails
        self.events: list[str] = []
        self.evaluations = 0

    def apply(self, merge_weights: Mapping[str, float]) -> float:
        recorded = len(read_journal(self.path)[1])
        self.events.append(f"apply {dict(merge_weights)} after {recorded} recorded")
        return sum(value * value for value in merge_weights.values()) ** 0.5

    def sequence_losses(self, sequences, micro_batch_size):
        raise AssertionError("not by the loop")

    def evaluate(self, proxy: World) -> Scores:
        assert proxy is self
        self.evaluations += 1
        self.events.append("evaluate")
        if self.fails(self.evaluations):
            raise EvaluationError(f"evaluation {self.evaluations} went wrong.")
        return {"web": {"loss": SCORE}}


def merge_weights(mixture: Mapping[str, float]) -> dict[str, float]:
    return {f"expert {name}": 2 * share for name, share in mixture.items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trials.jsonl"


def run(
    strategy: Planned, path: Path, world: World, report: Callable[[Trial], None] = lambda t: None
) -> None:
    run_search(strategy, Journal(path, DIGESTS), world, world, merge_weights, report)


def test_each_candidate_is_merged_scored_and_recorded_before_the_next(path: Path) -> None:
    world = World(path)
    reports = []
    run(
        Planned([proposal(1), proposal(2)], [proposal(3)]),
        path,
        world,
        lambda trial: reports.append((trial.index, len(read_journal(path)[1]))),
    )
    assert world.events == [
        "apply {'expert a': 0.2, 'expert b': 1.8} after 0 recorded",
        "evaluate",
        "apply {'expert a': 0.4, 'expert b': 1.6} after 1 recorded",
        "evaluate",
        "apply {'expert a': 0.6, 'expert b': 1.4} after 2 recorded",
        "evaluate",
        "apply {} after 3 recorded",
    ]
    assert reports == [(1, 1), (2, 2), (3, 3)]


def test_a_trial_holds_what_was_asked_merged_and_measured(path: Path) -> None:
    world = World(path)
    run(Planned([proposal(3)]), path, world)
    [trial] = read_journal(path)[1]
    assert (trial.index, trial.purpose) == (3, "purpose 3")
    assert trial.mixture == {"a": 0.3, "b": 0.7}
    assert trial.merge_weights == {"expert a": 0.6, "expert b": 1.4}
    assert trial.scores == {"web": {"loss": SCORE}}
    assert trial.task_vector_norm == pytest.approx((0.6**2 + 1.4**2) ** 0.5)
    assert set(trial.seconds) == {"merge", "evaluate"}
    assert trial.error is None


def test_the_base_is_asked_for_by_an_empty_mixture(path: Path) -> None:
    world = World(path)
    run(Planned([Proposal(0, "base", {})]), path, world)
    assert world.events[0] == "apply {} after 0 recorded"
    assert read_journal(path)[1][0].mixture == {}


def test_the_strategy_is_told_all_trials_after_every_batch(path: Path) -> None:
    strategy = Planned([proposal(1), proposal(2)], [proposal(3)])
    run(strategy, path, World(path))
    assert strategy.told == [[], [1, 2], [1, 2, 3]]


def test_told_trials_are_not_measured_again(path: Path) -> None:
    journal = Journal(path, DIGESTS)
    journal.append(Trial(2, "purpose 2", {}, {}, {}, error="a failure stays one"))
    before = path.read_bytes()
    world = World(path)
    strategy = Planned([proposal(1), proposal(2), proposal(3)])
    run(strategy, path, world)
    assert world.evaluations == 2
    assert [trial.index for trial in read_journal(path)[1]] == [2, 1, 3]
    assert path.read_bytes().startswith(before)
    assert strategy.told[0] == [2]


def test_a_finished_search_measures_nothing_and_leaves_the_base(path: Path) -> None:
    run(Planned([proposal(1)]), path, World(path))
    before = path.read_bytes()
    world = World(path)
    run(Planned([proposal(1)]), path, world)
    assert world.events == ["apply {} after 1 recorded"]
    assert path.read_bytes() == before


def test_a_failed_candidate_is_recorded_and_the_search_goes_on(path: Path) -> None:
    run(Planned([proposal(1), proposal(2)]), path, World(path, lambda call: call == 1))
    failed, good = read_journal(path)[1]
    assert failed.error == "evaluation 1 went wrong."
    assert failed.scores == {}
    assert failed.merge_weights == {"expert a": 0.2, "expert b": 1.8}
    assert good.error is None


def test_three_failures_in_a_row_end_the_search(path: Path) -> None:
    world = World(path, lambda call: call >= 2)
    with pytest.raises(SearchError) as caught:
        run(Planned([proposal(index) for index in range(9)]), path, world)
    assert "3 candidates failed in a row; the last: evaluation 4 went wrong." in str(caught.value)
    assert "search/trials.jsonl in run_dir was moved away" in str(caught.value)
    assert "new run_dir" not in str(caught.value)
    assert [trial.error is None for trial in read_journal(path)[1]] == [True] + [False] * 3


def test_failures_that_are_not_in_a_row_do_not_end_it(path: Path) -> None:
    """Also across batches: two at the end of one and one in the middle of the next."""
    world = World(path, lambda call: call % 3 != 0)
    run(Planned([proposal(0), proposal(1)], [proposal(i) for i in range(2, 9)]), path, world)
    assert world.evaluations == 9


def test_failures_are_counted_across_batches(path: Path) -> None:
    world = World(path, lambda call: True)
    with pytest.raises(SearchError, match="3 candidates failed in a row"):
        run(Planned([proposal(0), proposal(1)], [proposal(2), proposal(3)]), path, world)
    assert world.evaluations == 3


def test_failures_are_counted_across_a_kill_and_from_anew_after_they_ended_the_search(
    path: Path,
) -> None:
    plan = [proposal(index) for index in range(9)]
    run(Planned(plan[:2]), path, World(path, lambda call: True))  # and killed here
    for more in (1, 3):
        world = World(path, lambda call: True)
        with pytest.raises(SearchError, match="3 candidates failed in a row"):
            run(Planned(plan), path, world)
        assert world.evaluations == more
    assert len(read_journal(path)[1]) == 6


def test_how_many_failures_in_a_row_end_the_search_is_a_setting(path: Path) -> None:
    plan = [proposal(index) for index in range(9)]
    world = World(path, lambda call: call > 2)
    with pytest.raises(SearchError, match="5 candidates failed in a row"):
        run_search(
            Planned(plan), Journal(path, DIGESTS), world, world, merge_weights, most_failures=5
        )
    errors = [trial.error is not None for trial in read_journal(path)[1]]
    assert errors == [*[False] * errors.index(True), *[True] * 5]


def test_an_error_that_is_no_evaluation_error_ends_the_search_without_a_trial(path: Path) -> None:
    class Broken(World):
        def evaluate(self, proxy: World) -> Scores:
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run(Planned([proposal(1)]), path, Broken(path))
    assert read_journal(path)[1] == []


class Subsampled(World):
    """Also scores a first share, and what that left."""

    def evaluate_first(self, proxy: World) -> Scores:
        self.events.append("first")
        return {"web": {"loss": Score(1.0, 0.2, 2, "nats/token", False)}}

    def evaluate_others(self, proxy: World, first: Scores) -> Scores:
        self.events.append(f"others than {first['web']['loss'].num_samples}")
        if self.fails(0):
            raise EvaluationError("the others went wrong.")
        return {"web": {"loss": SCORE}}


def test_a_first_share_and_the_others_are_trials_of_their_own(path: Path) -> None:
    begun = {"web": {"loss": Score(1.0, 0.2, 2, "nats/token", False)}}
    world = Subsampled(path)
    first = replace(proposal(1), first=0.25)
    run(Planned([first], [replace(proposal(1), index=2, begun=begun)]), path, world)
    partial, whole = read_journal(path)[1]
    assert (partial.first, partial.scores) == (0.25, begun)
    assert (whole.first, whole.scores) == (None, {"web": {"loss": SCORE}})
    assert [event for event in world.events if "apply" not in event] == ["first", "others than 2"]


def test_others_that_cannot_be_scored_are_a_failed_trial(path: Path) -> None:
    world = Subsampled(path, fails=lambda call: True)
    run(Planned([replace(proposal(1), begun={"web": {"loss": SCORE}})]), path, world)
    [failed] = read_journal(path)[1]
    assert (failed.error, failed.scores, failed.first) == ("the others went wrong.", {}, None)


class Differentiable(World):
    """Also gives gradients, of a score that is the sum of the merge weights' products."""

    def loss_gradient(self, sequences, weights, micro_batch_size):
        raise AssertionError("not by the loop")

    def gradients(self, proxy: World, minibatch: Minibatch):
        assert proxy is self
        self.events.append(f"gradients {minibatch.number}")
        if self.fails(minibatch.number):
            raise EvaluationError("no gradient here.")
        return {"web": {"loss": SCORE}}, {"web": {"loss": {"expert a": 3.0, "expert b": -1.0}}}


def wanting(index: int) -> Proposal:
    batch = Minibatch(index, 0.5, 7, ("web",))
    return Proposal(index, f"gradient:{index}", {"a": 0.25, "b": 0.75}, batch)


def test_a_gradient_is_a_trial_by_shares_and_its_scores_are_nobodys(path: Path) -> None:
    world = Differentiable(path)
    run(Planned([proposal(1), wanting(2)]), path, world)
    scored, derived = read_journal(path)[1]
    assert scored.gradient is None
    assert derived.scores == {}
    assert derived.gradient is not None
    assert derived.gradient.minibatch == Minibatch(2, 0.5, 7, ("web",))
    assert derived.gradient.scores == {"web": {"loss": SCORE}}
    # A share of a is two of expert a, by the rule of these merge weights.
    assert derived.gradient.slopes == {"web": {"loss": {"a": 6.0, "b": -2.0}}}
    assert world.events[1:] == [
        "evaluate",
        "apply {'expert a': 0.5, 'expert b': 1.5} after 1 recorded",
        "gradients 2",
        "apply {} after 2 recorded",
    ]


def test_a_gradient_that_cannot_be_had_is_a_failed_trial(path: Path) -> None:
    run(Planned([wanting(1)], [wanting(2)]), path, Differentiable(path, lambda n: n == 1))
    failed, derived = read_journal(path)[1]
    assert (failed.error, failed.gradient, failed.scores) == ("no gradient here.", None, {})
    assert derived.gradient is not None


def test_the_chain_rule_goes_through_the_inverse_of_the_component_matrix() -> None:
    """Against differences of a function of the merge weights, along every share."""
    matrix = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.25, 0.05, 0.7], [0.3, 0.3, 0.4]])

    def weights(mixture: Mapping[str, float]) -> dict[str, float]:
        vector = np.array(list(mixture.values()))
        return dict(zip("klmn", merge_weights_of(vector, matrix).tolist(), strict=True))

    def score(vector: np.ndarray) -> float:
        alpha = np.linalg.pinv(matrix.T) @ vector
        return float(np.sin(alpha).sum() + alpha[0] * alpha[1])

    point = np.array([0.2, 0.5, 0.3])
    mixture = dict(zip("abc", point.tolist(), strict=True))
    alpha = np.array(list(weights(mixture).values()))
    slope = np.cos(alpha) + np.array([alpha[1], alpha[0], 0.0, 0.0])
    slopes = {"web": {"loss": dict(zip("klmn", slope.tolist(), strict=True))}}
    found = by_shares(slopes, mixture, weights)["web"]["loss"]
    for index, name in enumerate("abc"):
        step = 1e-5 * np.eye(3)[index]
        expected = (score(point + step) - score(point - step)) / 2e-5
        assert found[name] == pytest.approx(expected, rel=1e-7)
