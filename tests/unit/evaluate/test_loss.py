"""The held-out loss from given losses of sequences."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_mergemix.config.evaluate import LossTask
from megatron_mergemix.errors import DataError, EvaluationError
from megatron_mergemix.evaluate.loss import LossEvaluator
from megatron_mergemix.trials import Minibatch
from tests.support.tiny_dataset import write_dataset
from tests.unit.evaluate.test_windows import dataset, task

SEQ = 10


class FakeProxy:
    """Gives each sequence a loss by a rule, and remembers what it was asked."""

    def __init__(self, rule) -> None:
        self.rule = rule
        self.seen: list[tuple[torch.Tensor, int]] = []

    def apply(self, merge_weights) -> float:
        raise AssertionError("an evaluator scores what is there")

    def sequence_losses(self, sequences: torch.Tensor, micro_batch_size: int) -> torch.Tensor:
        self.seen.append((sequences, micro_batch_size))
        return torch.tensor([self.rule(row.tolist()) for row in sequences], dtype=torch.float64)


def evaluator(vocab_size: int = 1 << 15, **tasks: LossTask) -> LossEvaluator:
    return LossEvaluator(tasks, seq_length=SEQ, vocab_size=vocab_size, micro_batch_size=3)


def test_loss_is_the_mean_per_token_with_the_error_over_windows(tmp_path: Path) -> None:
    proxy = FakeProxy(lambda row: row[0] / 7)
    scores = evaluator(web=task(dataset(tmp_path / "a", 0, 101), sequences=4)).evaluate(proxy)
    assert set(scores["web"]) == {"loss"}
    score = scores["web"]["loss"]
    each = [start / 7 / SEQ for start in (0, 20, 50, 70)]
    assert proxy.seen[0][0][:, 0].tolist() == [0, 20, 50, 70]
    assert score.value == pytest.approx(statistics.fmean(each), rel=1e-12)
    assert score.stderr == pytest.approx(statistics.stdev(each) / 2, rel=1e-12)
    assert score.items == pytest.approx(each, rel=1e-6)
    assert (score.num_samples, score.unit, score.higher_is_better) == (4, "nats/token", False)


def test_bpb_divides_by_the_bits_of_a_byte(tmp_path: Path) -> None:
    data = dataset(tmp_path / "a", 0, 100, bytes_=250)
    scores = evaluator(web=task(data, metric="bpb")).evaluate(FakeProxy(lambda row: 5.0 + row[0]))
    loss, bpb = scores["web"]["loss"], scores["web"]["bpb"]
    assert bpb.value == pytest.approx(loss.value / math.log(2) / 2.5, rel=1e-12)
    assert bpb.stderr is not None
    assert loss.stderr is not None
    assert bpb.stderr == pytest.approx(loss.stderr / math.log(2) / 2.5, rel=1e-12)
    assert (bpb.unit, bpb.higher_is_better) == ("bits/byte", False)


def test_capabilities_get_their_own_windows_in_one_pass(tmp_path: Path) -> None:
    tasks = {
        "low": task(dataset(tmp_path / "a", 0, 100), sequences=2),
        "high": task(dataset(tmp_path / "b", 1000, 100), sequences=5),
        "middle": task(dataset(tmp_path / "c", 500, 100), sequences=3),
    }
    proxy = FakeProxy(lambda row: float(row[0] // 500) * SEQ)
    scores = evaluator(**tasks).evaluate(proxy)
    assert [scores[name]["loss"].value for name in ("low", "high", "middle")] == [0, 2, 1]
    assert [scores[name]["loss"].num_samples for name in ("low", "high", "middle")] == [2, 5, 3]
    [(sequences, micro_batch_size)] = proxy.seen
    assert (tuple(sequences.shape), sequences.dtype) == ((10, SEQ + 1), torch.int64)
    assert micro_batch_size == 3


def test_all_candidates_are_scored_on_the_same_windows(tmp_path: Path) -> None:
    fixed = evaluator(web=task(dataset(tmp_path / "a", 0, 100)))
    proxy = FakeProxy(lambda row: 1.0)
    fixed.evaluate(proxy)
    fixed.evaluate(proxy)
    assert torch.equal(proxy.seen[0][0], proxy.seen[1][0])


def test_one_window_has_no_standard_error(tmp_path: Path) -> None:
    data = dataset(tmp_path / "a", 0, 100)
    scores = evaluator(web=task(data, sequences=1)).evaluate(FakeProxy(lambda row: 3.0))
    assert scores["web"]["loss"].value == pytest.approx(0.3)
    assert scores["web"]["loss"].stderr is None


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_the_capability(tmp_path: Path, broken: float) -> None:
    tasks = {
        "web": task(dataset(tmp_path / "a", 0, 100)),
        "code": task(dataset(tmp_path / "b", 1000, 100)),
    }
    proxy = FakeProxy(lambda row: broken if row[0] == 1020 else 1.0)
    with pytest.raises(EvaluationError, match="capability code is not finite"):
        evaluator(**tasks).evaluate(proxy)


def test_tokens_beyond_the_vocabulary_are_refused_before_any_model_runs(tmp_path: Path) -> None:
    prefix = str(tmp_path / "a")
    write_dataset(Path(prefix), [np.full(100, 300)])
    assert evaluator(301, web=task(prefix)).digest().keys() == {"evaluate.web"}
    with pytest.raises(DataError) as caught:
        evaluator(300, web=task(prefix))
    assert f"token 300 in {prefix} (capability web)" in str(caught.value)
    assert "vocabulary of 300 rows" in str(caught.value)
    assert "another tokenizer" in str(caught.value)


class Derived(FakeProxy):
    """Losses that depend linearly on two merge weights, by rules of their own."""

    def loss_gradient(self, sequences, weights, micro_batch_size):
        losses = self.sequence_losses(sequences, micro_batch_size)
        first = float(weights @ sequences[:, 0].double())
        return losses, {"first": first, "second": float(weights.sum())}


def test_gradients_are_those_of_the_mean_over_the_windows_of_each_capability(
    tmp_path: Path,
) -> None:
    tasks = {
        "web": task(dataset(tmp_path / "a", 0, 101, bytes_=250), sequences=8, metric="bpb"),
        "code": task(dataset(tmp_path / "b", 1000, 101), sequences=8),
        "left out": task(dataset(tmp_path / "c", 500, 101), sequences=8),
    }
    minibatch = Minibatch(0, 0.5, 3, ("web", "code"))
    proxy = Derived(lambda row: row[0] / 7)
    scores, slopes = evaluator(**tasks).gradients(proxy, minibatch)
    assert set(scores) == set(slopes) == {"web", "code"}
    for (tokens, micro_batch_size), name in zip(proxy.seen, scores, strict=True):
        assert (len(tokens), micro_batch_size) == (4, 3)
        starts = tokens[:, 0].double()
        assert scores[name]["loss"].value == pytest.approx(starts.mean().item() / 7 / SEQ)
        assert scores[name]["loss"].num_samples == 4
        assert slopes[name]["loss"]["first"] == pytest.approx(starts.mean().item() / SEQ)
        assert slopes[name]["loss"]["second"] == pytest.approx(1 / SEQ)
    ratio = scores["web"]["bpb"].value / scores["web"]["loss"].value
    for expert, slope in slopes["web"]["loss"].items():
        assert slopes["web"]["bpb"][expert] == pytest.approx(ratio * slope)
    assert set(slopes["code"]) == {"loss"}


def test_a_gradient_that_is_not_finite_names_the_capability(tmp_path: Path) -> None:
    class Broken(Derived):
        def loss_gradient(self, *args):
            losses, slope = super().loss_gradient(*args)
            return losses, {**slope, "second": math.nan}

    scorer = evaluator(web=task(dataset(tmp_path / "a", 0, 100)))
    with pytest.raises(EvaluationError, match="capability web is not finite"):
        scorer.gradients(Broken(lambda row: 1.0), Minibatch(0, 1.0, 0, ("web",)))


def test_held_out_windows_are_scored_apart_from_the_others(tmp_path: Path) -> None:
    tasks = {
        "web": task(dataset(tmp_path / "a", 0, 101), sequences=5),
        "whole": task(dataset(tmp_path / "b", 1000, 51), sequences=5),
    }
    scorer = LossEvaluator(
        tasks, seq_length=SEQ, vocab_size=1 << 15, micro_batch_size=3, held_out=0.5
    )
    proxy = FakeProxy(lambda row: float(row[0]) * SEQ)
    searched, apart = scorer.evaluate(proxy), scorer.evaluate_held_out(proxy)
    assert set(searched) == {"web", "whole"}
    assert set(apart) == {"web"}, "all windows of the other are those of the search"
    assert set(searched["web"]["loss"].items) | set(apart["web"]["loss"].items) == set(
        range(0, 100, 10)
    )
    assert len(apart["web"]["loss"].items) == 5
    assert evaluator(**tasks).evaluate_held_out(proxy) == {}


def test_first_windows_and_the_others_together_are_all_windows(tmp_path: Path) -> None:
    tasks = {
        "low": task(dataset(tmp_path / "a", 0, 201, bytes_=400), sequences=20),
        "high": task(dataset(tmp_path / "b", 1000, 101), sequences=8),
    }
    evaluators = [
        LossEvaluator(
            tasks,
            seq_length=SEQ,
            vocab_size=1 << 15,
            micro_batch_size=3,
            first_share=0.25,
            seed=seed,
        )
        for seed in (0, 0, 1)
    ]
    proxy = FakeProxy(lambda row: float(row[0] % 7 + row[1] % 3) * SEQ)
    first = [each.evaluate_first(proxy) for each in evaluators]
    assert first[0] == first[1] != first[2]
    assert [first[0][name]["loss"].num_samples for name in tasks] == [5, 2]
    proxy.seen.clear()
    whole = evaluators[0].evaluate_others(proxy, first[0])
    assert [len(sequences) for sequences, _ in proxy.seen] == [15 + 6]
    expected = evaluators[0].evaluate(proxy)
    assert list(whole) == list(tasks)
    for name, metrics in expected.items():
        assert list(whole[name]) == list(metrics)
        for metric, score in metrics.items():
            found = whole[name][metric]
            assert found.items == score.items
            assert found.items[: len(first[0][name][metric].items)] == first[0][name][metric].items
            assert found.value == pytest.approx(score.value, rel=1e-6)
            assert found.stderr == pytest.approx(score.stderr, rel=1e-6)
            assert found.num_samples == score.num_samples
    unordered = LossEvaluator(tasks, seq_length=SEQ, vocab_size=1 << 15, micro_batch_size=3)
    plain = unordered.evaluate(proxy)["low"]["loss"].items
    assert sorted(plain) == sorted(expected["low"]["loss"].items)
