"""Draws of mixtures and items."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_mergemix.config.evaluate import Utility as Settings
from megatron_mergemix.evaluate.utility import Scale, Utility
from megatron_mergemix.trials import Score, Scores
from megatron_mergemix.validation.bootstrap import resampled

UTILITY = Utility(Settings(), {"math": ("loss",), "code": ("acc", "pass")})
SCALE = Scale(np.array([-3.0, 0.0]), np.array([2.0, 0.5]))


def score(items: np.ndarray, higher: bool, keep: bool = True) -> Score:
    kept = tuple(map(float, items)) if keep else ()
    return Score(float(items.mean()), 0.1, len(items), "", higher, kept)


def models(num: int, seed: int, keep: bool = True) -> list[Scores]:
    rng = np.random.default_rng(seed)
    return [
        {
            "math": {"loss": score(rng.normal(2.0, 1.0, size=40), False)},
            "code": {
                "acc": score(rng.integers(0, 2, size=30).astype(float), True, keep),
                "pass": score(rng.integers(0, 2, size=20).astype(float), True),
            },
        }
        for _ in range(num)
    ]


def test_draws_are_centred_on_the_scores_with_the_spread_of_the_items() -> None:
    proxies, trained = models(5, 1), models(5, 2)
    drawn = resampled(proxies, trained, UTILITY, SCALE, seed=0, num=4000)
    assert drawn.with_items == ("math", "code")
    math, code = drawn.capabilities
    for number, scores in enumerate(proxies):
        loss, acc, passed = scores["math"]["loss"], scores["code"]["acc"], scores["code"]["pass"]
        assert math.proxy[:, number].mean() == pytest.approx(-loss.value, abs=0.01)
        spread = np.std(loss.items) / np.sqrt(40)
        assert math.proxy[:, number].std() == pytest.approx(spread, rel=0.05)
        assert code.proxy[:, number].mean() == pytest.approx(
            (acc.value + passed.value) / 2, abs=0.01
        )
        spread = np.hypot(np.std(acc.items) / 30**0.5, np.std(passed.items) / 20**0.5) / 2
        assert code.proxy[:, number].std() == pytest.approx(spread, rel=0.05)


def test_the_utility_of_a_draw_is_that_of_its_capabilities() -> None:
    drawn = resampled(models(4, 1), models(4, 2), UTILITY, SCALE, seed=0, num=50)
    for side in ("proxy", "trained"):
        values = np.stack([getattr(each, side) for each in drawn.capabilities], axis=-1)
        np.testing.assert_allclose(getattr(drawn.overall, side), UTILITY.combine(values, SCALE))


def test_the_same_items_are_drawn_for_both_sides() -> None:
    """A model that is another one, moved by 1 on every item, stays 1 away in every draw."""
    proxies = models(4, 1)
    moved: list[Scores] = [
        {**each, "math": {"loss": score(np.array(each["math"]["loss"].items) + 1.0, False)}}
        for each in proxies
    ]
    math = resampled(proxies, moved, UTILITY, SCALE, seed=0, num=200).capabilities[0]
    np.testing.assert_allclose(math.proxy - math.trained, 1.0)
    assert math.proxy.std() > 0.1


def test_where_items_are_not_kept_only_mixtures_are_drawn() -> None:
    proxies, trained = models(4, 1, keep=False), models(4, 2)
    drawn = resampled(proxies, trained, UTILITY, SCALE, seed=0, num=300)
    assert drawn.with_items == ("math",)
    bare = [
        {
            n: {
                m: score(np.array(s.items or [s.value] * 3), s.higher_is_better, keep=False)
                for m, s in metrics.items()
            }
            for n, metrics in each.items()
        }
        for each in proxies
    ]
    fixed = resampled(bare, bare, UTILITY, SCALE, seed=0, num=300)
    assert fixed.with_items == ()
    for number, scores in enumerate(bare):
        values = fixed.capabilities[0].proxy[:, number]
        np.testing.assert_allclose(values, -scores["math"]["loss"].value)


def test_the_seed_decides_and_many_items_are_drawn_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from megatron_mergemix.validation import bootstrap

    def draw(seed: int) -> np.ndarray:
        return resampled(models(4, 1), models(4, 2), UTILITY, SCALE, seed, num=100).overall.proxy

    np.testing.assert_array_equal(draw(3), draw(3))
    assert not np.allclose(draw(3), draw(4))
    whole = draw(3)
    monkeypatch.setattr(bootstrap, "_ITEMS_AT_ONCE", 400)
    assert draw(3).shape == whole.shape
    assert draw(3).std() == pytest.approx(whole.std(), rel=0.15)
