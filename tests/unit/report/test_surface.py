"""The drawn surface is that of the verdict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_mergemix.mixtures.simplex import Bounds
from megatron_mergemix.report.gather import Run, read_run
from megatron_mergemix.report.surface import Surface, left_out, line, plane, surface_of
from megatron_mergemix.search.uncertainty import SURE
from tests.support.searched import searched


@pytest.fixture(scope="module")
def surface(run: Run) -> Surface:
    found = surface_of(run)
    assert isinstance(found, Surface)
    return found


def test_left_out_errors_are_those_on_record(run: Run, surface: Surface) -> None:
    assert run.result is not None
    utility, *capabilities = left_out(run, surface)
    assert utility.name == "utility"
    for found in capabilities:
        error = np.sqrt(np.mean((found.measured - found.predicted) ** 2))
        assert error == pytest.approx(run.result["surrogates"][found.name]["rmse"])
        assert found.surrogate == run.result["surrogates"][found.name]["surrogate"]


def test_losses_are_drawn_in_their_own_sign(run: Run, surface: Surface) -> None:
    found = left_out(run, surface)[1]
    scores = [t.scores[found.name]["loss"].value for t in run.scored]
    assert set(found.measured) <= set(scores)


def test_a_line_passes_the_optimum_with_the_interval_on_record(run: Run, surface: Surface) -> None:
    assert run.result is not None
    low, high = run.result["interval"]
    for place in range(3):
        found = line(surface, place)
        at = int(np.argmin(np.abs(found.shares - surface.optimum[place])))
        assert found.shares[at] == pytest.approx(surface.optimum[place])
        # 1000 draws instead of 4000: ends of an interval to a tenth of its length.
        assert found.low[at] == pytest.approx(low, abs=0.1 * (high - low))
        assert found.high[at] == pytest.approx(high, abs=0.1 * (high - low))
        assert found.chance[at] < SURE  # the optimum is as good as itself


def test_what_is_as_good_on_a_line_lies_in_the_range_on_record(run: Run, surface: Surface) -> None:
    assert run.result is not None
    good = run.result["as_good"]
    for place, name in enumerate(run.domains):
        found = line(surface, place)
        shares = found.shares[found.chance < SURE]
        step = 1 / 60
        assert shares.min() >= good["least"][name] - step
        assert shares.max() <= good["largest"][name] + step


def test_trials_on_a_line_have_no_distance_and_others_their_share_of_tokens(
    surface: Surface,
) -> None:
    found = line(surface, 0)
    corner = int(np.argmax(surface.points[:, 0]))
    assert found.distances[corner] == pytest.approx(0)
    # The second domain alone: the line has its part of the optimum at a share of 0 there.
    other = int(np.argmax(surface.points[:, 1]))
    part = surface.optimum[1] / surface.optimum[1:].sum()
    assert found.distances[other] == pytest.approx(1 - part)


def test_the_plane_of_three_domains_is_the_whole_simplex(surface: Surface) -> None:
    found = plane(surface)
    assert found is not None
    assert found.domains == (0, 1, 2)
    assert found.rest == pytest.approx(0)
    assert found.distances == pytest.approx(np.zeros(len(surface.points)))
    assert found.mean == pytest.approx(surface.learned(found.corners))
    best = found.corners[int(np.argmin(found.chance))]
    assert np.abs(best - surface.optimum).max() < 0.1


def test_bounds_that_leave_next_to_nothing_leave_no_plane_but_lines(surface: Surface) -> None:
    tight = Bounds(surface.optimum - 0.01, surface.optimum + 0.01)
    bounded = Surface(**{**vars(surface), "bounds": tight})
    assert plane(bounded) is None
    shares = line(bounded, 0).shares
    assert surface.optimum[0] in shares
    assert np.ptp(shares) <= 0.02


def test_a_fixed_share_leaves_a_line_of_the_plane_which_cannot_be_filled(surface: Surface) -> None:
    for least, largest, is_drawn in ((0.25, 0.25, False), (0.3, 0.32, False), (0.3, 0.4, True)):
        bounds = Bounds(np.array([least, 0.0, 0.0]), np.array([largest, 1.0, 1.0]))
        bounded = Surface(**{**vars(surface), "bounds": bounds})
        assert (plane(bounded) is not None) == is_drawn


def test_what_depends_on_tokens_is_not_drawn_without_them(run: Run) -> None:
    config, laptop = run.config, replace(run, tokens=None)
    assert isinstance(surface_of(laptop), Surface)
    near_data = config.search.model_copy(update={"kl": 0.1})
    limited = {n: d.model_copy(update={"max_epochs": 2.0}) for n, d in config.domains.items()}
    for change in ({"search": near_data}, {"domains": limited}):
        found = surface_of(replace(laptop, config=config.model_copy(update=change)))
        assert isinstance(found, str)
        assert "depends on the tokens" in found


def test_bounds_that_no_trial_keeps_leave_nothing_to_learn_from(run: Run) -> None:
    share = 1 / 3 + 1e-4
    domains = {
        name: domain.model_copy(update={"bounds": (0.0, share)})
        for name, domain in run.config.domains.items()
    }
    trials = [trial for trial in run.trials if trial.purpose != "prior:uniform"]
    config = run.config.model_copy(update={"domains": domains})
    found = surface_of(replace(run, config=config, trials=trials, result=None))
    assert found == "no trial on all items is within the bounds."


def test_two_domains_have_a_line_and_bounds_cut_it(tmp_path: Path) -> None:
    path = searched(tmp_path, ["math", "code"])
    found = surface_of(read_run(path))
    assert isinstance(found, Surface)
    assert plane(found) is None
    bounded = Surface(**{**vars(found), "bounds": found.bounds._replace(high=np.array([0.9, 1.0]))})
    assert line(bounded, 0).shares.max() == pytest.approx(0.9)
