"""The ensemble of the experts' probabilities: its arithmetic, its weights, and its files."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_mergemix.errors import SearchError
from megatron_mergemix.mixtures.merge_weights import component_matrix, merge_weights
from megatron_mergemix.mixtures.simplex import lattice, uniform
from megatron_mergemix.search.ensemble import (
    Ensemble,
    ensemble_weights,
    log_likelihood,
    token_table,
)
from megatron_mergemix.search.ensemble_files import has_tokens, read_tokens, write_tokens


def tokens(num, num_experts, seed=0):
    """Log-likelihoods as experts have them: much in common, and each better on its own domain."""
    rng = np.random.default_rng(seed)
    level = -rng.gamma(1.5, 1.5, size=num)
    domain = rng.integers(num_experts, size=num)
    values = level[:, None] + 0.3 * rng.normal(size=(num, num_experts))
    values[np.arange(num), domain] += rng.gamma(1.0, 0.8, size=num)
    return np.minimum(values, -1e-4)


def brute_force(values, alpha):
    return np.log(np.exp(values) @ alpha.T).mean(axis=0)


def test_few_tokens_are_predicted_exactly():
    values = tokens(1000, 4)
    points = lattice(4, 4)
    found = log_likelihood(token_table(values), points)
    assert found == pytest.approx(brute_force(values, points), abs=1e-12)


def test_many_tokens_are_grouped_and_every_expert_alone_stays_exact():
    values = tokens(60_000, 5)
    table = token_table(values)
    assert table.relative.shape == (4096, 5)
    assert log_likelihood(table, np.eye(5)) == pytest.approx(values.mean(axis=0), abs=1e-11)
    points = lattice(5, 3)
    error = log_likelihood(table, points) - brute_force(values, points)
    assert np.abs(error).max() < 0.003
    assert error.max() < 1e-9  # concave: a mean of log-likelihoods is never above


def test_an_average_of_probabilities_beats_the_average_of_losses():
    values = tokens(2000, 3)
    mixed = log_likelihood(token_table(values), uniform(3)[None])[0]
    assert mixed > values.mean(axis=0).mean() + 0.05


def test_a_token_that_only_one_expert_knows_does_not_overflow():
    values = np.array([[-0.1, -5000.0], [-3.0, -0.2]])
    found = log_likelihood(token_table(values), np.array([[0.5, 0.5], [1.0, 0.0]]))
    assert np.isfinite(found).all()
    assert found[1] == pytest.approx(-1.55)


def test_the_weights_are_the_merge_weights_where_none_is_negative():
    matrix = component_matrix(3, 0.4, uniform(3))
    points = lattice(3, 6)
    weights = ensemble_weights(points, matrix)
    outside = 0
    for point, found in zip(points, weights, strict=True):
        exact = merge_weights(point, matrix)
        if exact.min() >= 0:
            assert found == pytest.approx(exact, abs=1e-12)
        else:
            outside += 1
    assert outside >= 3
    assert (weights >= 0).all()
    assert weights.sum(axis=1) == pytest.approx(np.ones(len(points)))
    # What an expert was trained on is that expert; beyond it, it still is.
    assert ensemble_weights(matrix, matrix) == pytest.approx(np.eye(3), abs=1e-12)
    assert ensemble_weights(np.eye(3), matrix) == pytest.approx(np.eye(3), abs=1e-12)


def test_the_tokens_are_read_once_and_only_when_asked():
    reads = []

    def load():
        reads.append(1)
        return {"web": tokens(50, 3)}

    ensemble = Ensemble(np.eye(3), load)
    assert reads == []
    ensemble("web", lattice(3, 2))
    ensemble("web", lattice(3, 3))
    assert reads == [1]


# ---- files ----

DIGESTS = {"expert": "1", "evaluate.web": "w"}


def test_files_give_back_the_tokens_by_expert(tmp_path):
    values = tokens(12, 2).astype(np.float32)
    paths = {name: tmp_path / "deep" / f"{name}.npz" for name in ("math", "code")}
    for column, path in enumerate(paths.values()):
        write_tokens(path, DIGESTS, {"web": values[:, column].reshape(3, 4)})
    read = read_tokens(paths, dict.fromkeys(paths, DIGESTS))
    assert set(read) == {"web"}
    assert (read["web"] == values).all()


def test_a_file_that_is_not_there_is_measured_and_one_of_something_else_refused(tmp_path):
    path = tmp_path / "math.npz"
    assert not has_tokens(path, DIGESTS)
    write_tokens(path, DIGESTS, {"web": np.zeros((2, 3))})
    assert has_tokens(path, DIGESTS)
    message = r"math\.npz was measured on something else: expert: 1 -> 2\. Undo"
    with pytest.raises(SearchError, match=message):
        has_tokens(path, {**DIGESTS, "expert": "2"})
    with pytest.raises(SearchError, match=r"start the search again, it measures what is missing"):
        read_tokens({"code": tmp_path / "code.npz"}, {"code": DIGESTS})


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "math.npz"
    write_tokens(path, DIGESTS, {"web": np.zeros((2, 3))})
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SearchError, match=r"math\.npz is damaged .* Delete it"):
        has_tokens(path, DIGESTS)
