"""What the surrogate says of references, against a surrogate that is fitted here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_mergemix.config import Config, load_config
from megatron_mergemix.evaluate.digests import objective
from megatron_mergemix.evaluate.utility import Utility
from megatron_mergemix.experiment.search_record import measured_trials, search_result
from megatron_mergemix.mixtures.simplex import to_vector
from megatron_mergemix.search.calibration import utility_scale
from megatron_mergemix.search.landscape import Landscape
from megatron_mergemix.search.uncertainty import Posterior
from megatron_mergemix.training_runs.mixtures import reference_mixture
from megatron_mergemix.validation.fidelity import validation_result
from tests.support.finished import finish_reference, score_proxy
from tests.support.searched import finish, scores_of_mixture, write_settings

DOMAINS = ["math", "code", "web"]
TRIALS = ["learned", "uniform", "proportional"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Return a searched experiment with four more references; math counts more than the others."""
    changes = {"validation": {"space_filling": 4}}
    path = write_settings(tmp_path_factory.mktemp("predictions"), DOMAINS, changes)
    weights = "evaluate.utility.weights={math-text: 4, code-text: 2, web-text: 1}"
    config = load_config(path, [weights])
    finish(config)
    for place, name in enumerate(config.references):
        mixture = reference_mixture(config, name)
        finish_reference(config, name, scores_of_mixture(config, mixture, 200 + place))
        score_proxy(config, name, scores_of_mixture(config, mixture, 300 + place))
    return config


@pytest.fixture(scope="module")
def result(config: Config) -> dict[str, Any]:
    return validation_result(config)


@pytest.fixture(scope="module")
def fitted(config: Config) -> tuple[Landscape, Posterior]:
    """Return the surface, and its draws, as every trial teaches them."""
    utility, trials = Utility(config.evaluate.utility, objective(config)), measured_trials(config)
    scale = utility_scale(utility, trials)
    scored = [trial for trial in trials if trial.mixture and trial.error is None]
    landscape = Landscape(scored, DOMAINS, utility, scale, "auto")
    return landscape, Posterior(landscape, scored, DOMAINS)


def points_of(result: dict[str, Any]) -> np.ndarray:
    return np.array([to_vector(row["mixture"], DOMAINS) for row in result["references"]])


def test_the_predicted_utility_is_that_of_the_surface_at_the_row_s_own_mixture(
    result: dict[str, Any], fitted: tuple[Landscape, Posterior]
) -> None:
    points, landscape = points_of(result), fitted[0]
    predicted = [row["predicted"]["utility"] for row in result["references"]]
    np.testing.assert_allclose(predicted, landscape(points), rtol=1e-9)
    # Another order of the domains, or of the rows, would be seen.
    assert np.abs(landscape(points[:, ::-1]) - predicted).max() > 0.05
    assert np.ptp(predicted) > 0.05


def test_intervals_are_percentiles_of_draws_there_and_hold_each_other(
    result: dict[str, Any], fitted: tuple[Landscape, Posterior]
) -> None:
    draws = fitted[1].sample(points_of(result), 4000, np.random.default_rng(99))
    for row, drawn in zip(result["references"], draws.T, strict=True):
        intervals = row["predicted"]["intervals"]
        for level in (0.5, 0.8, 0.95):
            ends = np.percentile(drawn, [50 * (1 - level), 50 * (1 + level)])
            # Of 4000 draws, a percentile at 2.5 % is off by 4 % of a deviation.
            assert intervals[str(level)] == pytest.approx(ends, abs=0.2 * drawn.std())
        a, b, c = (intervals[level] for level in ("0.95", "0.8", "0.5"))
        assert a[0] < b[0] < c[0] < c[1] < b[1] < a[1]
        assert a == row["predicted"]["interval"]
    widths = draws.std(axis=0)
    assert np.ptp(draws.mean(axis=0)) > 0.5 * widths.max()  # rows are told apart


def test_the_learned_mixture_is_predicted_as_the_search_says(
    config: Config, result: dict[str, Any]
) -> None:
    found = search_result(config)
    assert found is not None
    [row] = [row for row in result["references"] if row["name"] == "learned"]
    expected = found["alternatives"][found["source"]]["expected"]
    assert row["predicted"]["utility"] == pytest.approx(expected, rel=1e-9)
    low, high = found["interval"]
    deviation = (high - low) / 3.92
    assert row["predicted"]["interval"] == pytest.approx([low, high], abs=0.2 * deviation)


def test_only_mixtures_that_are_no_trials_are_counted(result: dict[str, Any]) -> None:
    rows, fidelity = result["references"], result["fidelity"]
    assert {row["name"] for row in rows if row["predicted"]["is_trial"]} == set(TRIALS)
    assert fidelity["calibration_n"] == 4
    new = [row for row in rows if row["name"] not in TRIALS]
    for level in ("0.5", "0.8", "0.95"):
        limits = [row["predicted"]["intervals"][level] for row in new]
        merges = [row["proxy"]["utility"] for row in new]
        held = [a <= value <= b for value, (a, b) in zip(merges, limits, strict=True)]
        assert fidelity["calibration_of_merges"][level] == pytest.approx(np.mean(held))


def test_where_every_reference_is_a_trial_a_note_says_why_nothing_is_calibrated(
    config: Config,
) -> None:
    references = {name: config.references[name] for name in TRIALS}
    found = validation_result(config.model_copy(update={"references": references}))
    assert found["fidelity"]["calibration_n"] == 0
    assert found["fidelity"]["calibration"] is None
    assert any(
        note.startswith("Every reference mixture is a trial of the search")
        for note in found["notes"]
    )
