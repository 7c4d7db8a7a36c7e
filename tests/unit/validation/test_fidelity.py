"""The result of a validation: rows, fidelity, calibration, costs, notes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mergemix.config import Config, load_config
from megatron_mergemix.config.evaluate import Utility as Settings
from megatron_mergemix.evaluate.utility import Scale, Utility
from megatron_mergemix.experiment.digests import search_digests
from megatron_mergemix.experiment.search_record import measured_trials
from megatron_mergemix.files.publishing import publish_json
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.trials import Score, Scores
from megatron_mergemix.validation.bootstrap import resampled
from megatron_mergemix.validation.costs import costs
from megatron_mergemix.validation.fidelity import fidelity_of, validation_result
from tests.support.finished import finish_reference, finish_search, losses, score_proxy
from tests.support.untrained import with_experts, write_config
from tests.unit.launch.test_submit import finish

# Mean losses of 1.1, 1.2, ... are utilities of 0.95, 0.9, ...: a loss x counts (3 - x) / 2.
TRAINED = {
    "learned": losses(1.0, 1.1, 1.2),
    "uniform": losses(1.1, 1.2, 1.3),
    "proportional": losses(1.2, 1.3, 1.4),
    "filling-01": losses(1.3, 1.4, 1.5),
    "filling-02": losses(1.4, 1.5, 1.6),
}
PROXIES = {
    "learned": losses(1.6, 1.6, 1.6),
    "uniform": losses(1.5, 1.5, 1.5),  # put first
    "proportional": losses(1.7, 1.7, 1.7),
    "filling-01": losses(1.8, 1.8, 1.8),
    "filling-02": losses(1.9, 1.9, 1.9),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Return an experiment whose five references are measured, and their proxies."""
    path = write_config(tmp_path_factory.mktemp("fidelity"))
    config = with_experts(path, "validation.space_filling=2", "search.trials=8")
    finish_search(config)
    for name, scores in TRAINED.items():
        finish_reference(config, name, scores)
        score_proxy(config, name, PROXIES[name])
    return config


@pytest.fixture(scope="module")
def result(config: Config) -> dict[str, Any]:
    return validation_result(config)


def test_every_row_has_its_proxy_and_what_was_predicted(result: dict[str, Any]) -> None:
    rows = result["references"]
    assert [row["name"] for row in rows] == list(TRAINED)
    assert [row["utility"] for row in rows] == pytest.approx([0.95, 0.9, 0.85, 0.8, 0.75])
    assert [row["proxy"]["utility"] for row in rows] == pytest.approx([0.7, 0.75, 0.65, 0.6, 0.55])
    assert rows[1]["proxy"]["scores"] == {name: {"loss": 1.5} for name in ("math", "code", "web")}
    for row in rows:
        low, high = row["predicted"]["interval"]
        assert low <= high
        assert row["predicted"]["intervals"]["0.95"] == [low, high]


def test_one_exchanged_pair_is_seen_overall_and_in_every_capability(
    result: dict[str, Any],
) -> None:
    fidelity = result["fidelity"]
    assert set(fidelity["capabilities"]) == {"math", "code", "web"}
    for part in (fidelity["overall"], *fidelity["capabilities"].values()):
        assert part["n"] == 5
        assert part["spearman"] == pytest.approx(0.9)
        assert part["kendall"] == pytest.approx(0.8)
    assert fidelity["overall"]["offset"] == pytest.approx(-0.2)
    assert fidelity["overall"]["mean_absolute_error"] == pytest.approx(0.2)
    assert fidelity["capabilities"]["math"]["offset"] == pytest.approx(-0.5)  # nats, not utility
    assert fidelity["surrogate"]["n"] == 5


def test_training_only_the_proxies_best_loses_what_it_misses(result: dict[str, Any]) -> None:
    found = {k: part["regret"] for k, part in result["fidelity"]["top_k"].items()}
    assert found == {"1": pytest.approx(0.05), "3": pytest.approx(0.0), "5": None}
    low, high = result["fidelity"]["top_k"]["1"]["interval"]
    assert low == pytest.approx(0.0)
    assert high >= 0.05 - 1e-9


def test_the_result_has_no_nan_and_is_the_same_again(
    config: Config, result: dict[str, Any]
) -> None:
    assert json.dumps(result, allow_nan=False) == json.dumps(validation_result(config))
    assert result["digests"] == search_digests(config)


def test_what_is_missing_is_said(result: dict[str, Any]) -> None:
    assert result["notes"] == [
        "There is no regret of the best 5: that is every reference there is.",
        "Intervals take the items of math, code, web as they are: single items are not kept, so "
        "only the choice of mixtures is in them.",
        "The experts are given, so how long their training took is not on record; their tokens are "
        "those of experts.tokens.",
    ]


def test_what_is_left_out_is_said(config: Config) -> None:
    left_out = config.validation.model_copy(update={"leave_out": ["filling-02"]})
    references = {n: mixture for n, mixture in config.references.items() if n != "filling-02"}
    fewer = config.model_copy(update={"validation": left_out, "references": references})
    found = validation_result(fewer)
    assert "Left out, as validation.leave_out says: filling-02." in found["notes"]
    assert found["fidelity"]["overall"]["n"] == 4


def test_three_references_have_no_ranks_but_everything_else(tmp_path: Path) -> None:
    config = with_experts(write_config(tmp_path), "search.trials=8")
    finish_search(config)
    for name in config.references:
        finish_reference(config, name, TRAINED["learned"])
        score_proxy(config, name, PROXIES[name])
    found = validation_result(config)
    assert found["fidelity"]["overall"]["spearman"] is None
    assert found["fidelity"]["overall"]["mean_absolute_error"] == pytest.approx(0.25)
    assert found["notes"][0] == (
        "A rank correlation needs at least 4 reference mixtures, there are 3: set "
        "validation.space_filling, such as 24."
    )


# ---- calibration ----


def fidelity_of_flat_predictions(
    merges: list[float], trained: list[float], is_trial: list[bool]
) -> dict[str, Any]:
    """Return the fidelity where the surrogate predicts 0 of every mixture, +-0.5, 1 and 2."""
    utility = Utility(Settings(normalize="none"), {"math": ("acc",)})
    scale = Scale(np.zeros(1), np.ones(1))
    intervals = {"0.5": [-0.5, 0.5], "0.8": [-1.0, 1.0], "0.95": [-2.0, 2.0]}
    rows = [
        {
            "utility": truth,
            "proxy": {"utility": merge},
            "predicted": {
                "utility": 0.0,
                "interval": [-2.0, 2.0],
                "intervals": intervals,
                "is_trial": trial,
            },
        }
        for truth, merge, trial in zip(trained, merges, is_trial, strict=True)
    ]

    def scores(values: list[float]) -> list[Scores]:
        return [{"math": {"acc": Score(v, 0.1, 9, "accuracy", True)}} for v in values]

    sides = scores(merges), scores(trained)
    drawn = resampled(*sides, utility, scale, seed=0, num=50)
    return fidelity_of(rows, *sides, utility, drawn)


MERGES, MODELS = [0.0, 0.4, 0.8, -1.5], [10.0, 10.4, 10.8, 8.5]


def test_calibration_tells_the_merges_from_the_trained_models() -> None:
    """Merges lie within the intervals, trained models 10 above."""
    found = fidelity_of_flat_predictions(MERGES, MODELS, [False] * 4)
    assert found["calibration_n"] == 4
    assert found["calibration_of_merges"] == {"0.5": 0.5, "0.8": 0.75, "0.95": 1.0}
    assert found["calibration"] == {"0.5": 0.0, "0.8": 0.0, "0.95": 0.0}
    # Without the mean gap of the others: 0.1, 0.63, 1.17, -1.9.
    assert found["calibration_shifted"] == {"0.5": 0.25, "0.8": 0.5, "0.95": 1.0}
    assert found["surrogate"]["spearman"] is None  # a surrogate that predicts the same of all


def test_what_the_surrogate_has_learned_is_not_counted_as_held() -> None:
    found = fidelity_of_flat_predictions(MERGES, MODELS, [True, False, False, True])
    assert found["calibration_n"] == 2
    assert found["calibration_of_merges"] == {"0.5": 0.5, "0.8": 1.0, "0.95": 1.0}
    # Their gaps are still those of all others: 0.63 and 1.17.
    assert found["calibration_shifted"] == {"0.5": 0.0, "0.8": 0.5, "0.95": 1.0}
    assert found["surrogate"]["n"] == 4
    found = fidelity_of_flat_predictions(MERGES, MODELS, [True] * 4)
    assert found["calibration_n"] == 0
    names = ("calibration", "calibration_of_merges", "calibration_shifted")
    assert [found[name] for name in names] == [None] * 3


# ---- costs ----


def test_the_cost_of_both_sides_is_what_is_on_record(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path), ["references={uniform: uniform, odd: {web: 1}}"])
    finish(config, "base", "experts/math", "experts/code", "experts/web")
    finish_search(config)
    for name in config.references:
        finish_reference(config, name, TRAINED["learned"])
        score_proxy(config, name, PROXIES["learned"])
    run_dir = RunDir(config.run_dir)
    folders = [*map(run_dir.expert, config.domains), *map(run_dir.reference, config.references)]
    for seconds, folder in enumerate(folders, start=10):
        record = json.loads((folder / "finished.json").read_text())
        publish_json(folder / "finished.json", {**record, "seconds": float(seconds)})
    found, notes = costs(config)
    trials = sum(sum(trial.seconds.values()) for trial in measured_trials(config))
    tokens = 11 * 4 * 8  # steps of four sequences of eight
    assert found == {
        "proxies": {
            "runs": 3,
            "tokens": 3 * tokens,
            "seconds": 10 + 11 + 12 + trials + 2 * 2.0,
            "training_seconds": 10.0 + 11 + 12,
            "scoring_seconds": trials + 2 * 2.0,
        },
        "references": {
            "runs": 2,
            "tokens": 2 * tokens,
            "seconds": 13 + 14 + 2 * 3.0,
            "training_seconds": 13.0 + 14,
            "scoring_seconds": 2 * 3.0,
        },
    }
    assert notes == []
    record = json.loads((run_dir.reference("odd") / "finished.json").read_text())
    del record["seconds"]
    publish_json(run_dir.reference("odd") / "finished.json", record)
    found, notes = costs(config)
    assert found["references"]["seconds"] is None
    assert found["references"]["scoring_seconds"] == 6.0
    assert len(notes) == 1
