"""LightGBM with small leaves: what its defaults get wrong, and that it is the same every time."""

from __future__ import annotations

import lightgbm
import numpy as np
import pytest

from megatron_mergemix.errors import SearchError
from megatron_mergemix.mixtures.simplex import sample_uniform, whole_simplex
from megatron_mergemix.search.surrogates.choose import spearman
from megatron_mergemix.search.surrogates.trees import FOLDS, SmallTrees


def points(num, num_domains, seed=0):
    return sample_uniform(whole_simplex(num_domains), num, np.random.default_rng(seed))


def test_small_leaves_see_what_the_defaults_call_a_constant():
    x, unseen = points(32, 4), points(300, 4, seed=1)
    y = x[:, 0] - x[:, 1]
    rows = lightgbm.Dataset(x, y, params={"verbose": -1})
    default = lightgbm.train({"verbose": -1, "num_threads": 1}, rows, 100).predict(unseen)
    assert np.ptp(default) == 0.0
    surrogate = SmallTrees()
    surrogate.fit(x, y)
    assert spearman(surrogate.predict(unseen)[0], unseen[:, 0] - unseen[:, 1]) > 0.85


def test_trees_want_sixteen_rows_or_two_more_than_domains():
    assert SmallTrees.min_rows(4) == 16
    assert SmallTrees.min_rows(15) == 17
    x = points(15, 4)
    with pytest.raises(SearchError, match="needs at least 16 measured mixtures .* got 15"):
        SmallTrees().fit(x, x[:, 0])


def test_left_out_rows_are_predicted_without_them():
    # A row that is far from the law is not believed where it is left out.
    x = points(40, 4)
    y = x[:, 0].copy()
    y[7] = 5.0
    surrogate = SmallTrees()
    surrogate.fit(x, y)
    assert surrogate.leave_one_out()[7] < 2.5
    assert surrogate.predict(x[[7]])[0][0] > 4.0


def test_two_fits_of_the_same_rows_agree_to_the_bit_and_folds_follow_the_rows():
    x = points(30, 4)
    y = x[:, 0] ** 2 + x[:, 1]
    order = np.random.default_rng(0).permutation(30)
    first, again, shuffled = SmallTrees(), SmallTrees(), SmallTrees()
    first.fit(x, y)
    again.fit(x, y)
    shuffled.fit(x[order], y[order])
    assert np.array_equal(first.leave_one_out(), again.leave_one_out())
    assert np.abs(first.leave_one_out()[order] - shuffled.leave_one_out()).max() < 1e-6
    assert len(first._refits) == FOLDS
