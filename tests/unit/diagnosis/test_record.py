"""What a diagnosis is measured on, and what makes a record stale."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mergemix.config import Config
from megatron_mergemix.diagnosis.record import (
    WINDOWS,
    diagnosed_losses,
    diagnosis_digests,
    diagnosis_of,
    is_complete,
    merges_to_check,
    on_record,
    publish_measured,
    source_of,
)
from megatron_mergemix.experiment.digests import search_digests
from megatron_mergemix.files.publishing import publish_json
from megatron_mergemix.mixtures.merge_weights import component_matrix
from megatron_mergemix.mixtures.simplex import uniform
from megatron_mergemix.run_dir import RunDir
from tests.support.untrained import given, with_experts, write_config

EXPERTS = ["math", "code", "web"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_config(tmp_path)


def measured(config: Config) -> dict[str, Any]:
    """Return the record of orthogonal experts whose losses bend alike and differ in slope."""
    loss = {
        "source": "held-out data",
        "windows": 3,
        "loss": 2.0,
        "second_order": (0.02 * np.eye(3)).tolist(),
        "lengths": [0.1, 0.1, 0.1],
        "steps": [0.5, 0.5, 0.5],
        "disagreements": [0.001, 0.001, 0.001],
    }
    losses = {}
    for number, name in enumerate(EXPERTS):
        slope = np.full(3, 0.1) - 0.4 * np.eye(3)[number]
        alpha = np.eye(3)
        seen = 2.0 + alpha @ slope + 0.01
        losses[name] = {
            **loss,
            "first_order": slope.tolist(),
            "merges": {"alpha": alpha.tolist(), "losses": seen.tolist()},
        }
    return {
        "products": (4.0 * np.eye(3)).tolist(),
        "base_norm": 10.0,
        "delta": [0.02, 0.03, 0.01],
        "losses": losses,
        "digests": diagnosis_digests(config),
    }


def test_a_domain_without_a_capability_of_its_name_is_measured_on_its_training_data(
    path: Path,
) -> None:
    web = {"loss": {"prefixes": [str(path.parent / "web_heldout")], "sequences": 3}}
    config = with_experts(path, f"evaluate.capabilities={{knowledge: {web}, web: {web}}}")
    tasks = diagnosed_losses(config)
    assert list(tasks) == ["knowledge", "web", "math", "code"]
    assert tasks["math"].prefixes == [str(path.parent / "math")]
    assert [tasks[name].sequences for name in tasks] == [3, 3, WINDOWS, 37]
    sources = [source_of(config, name) for name in tasks]
    assert sources == ["held-out data"] * 2 + ["training data"] * 2


def test_a_record_is_of_these_checkpoints_and_of_all_losses(path: Path) -> None:
    config = with_experts(path)
    assert on_record(config) is None
    record = measured(config)
    part = {**record, "losses": {"math": record["losses"]["math"]}}
    publish_measured(config, part)
    assert on_record(config) == part
    assert not is_complete(config, on_record(config))
    publish_measured(config, record)
    assert is_complete(config, on_record(config))


@pytest.mark.parametrize(
    "override",
    [
        "experts.general_share=0.5",
        "evaluate.capabilities.math.loss.sequences=2",
        "model.num_attention_heads=4",
    ],
)
def test_a_record_of_other_settings_does_not_count(path: Path, override: str) -> None:
    config = with_experts(path)
    publish_measured(config, measured(config))
    assert on_record(with_experts(path, override)) is None
    assert on_record(with_experts(path, "search.trials=30", "parallel.processes=2")) is not None


def test_a_changed_expert_is_measured_anew(path: Path) -> None:
    config = with_experts(path)
    publish_measured(config, measured(config))
    folder = given(path, "code", 3.0)
    shutil.rmtree(folder)
    given(path, "code", 3.5)
    assert on_record(config) is None


def test_the_diagnosis_of_experts_that_do_not_disturb_each_other(path: Path) -> None:
    config = with_experts(path, "experts.general_share=0")
    found = diagnosis_of(config, measured(config))
    assert found["cosines"] == np.eye(3).tolist()
    assert found["norms"] == [2.0, 2.0, 2.0]
    assert found["applied_norm"]["uniform"] == pytest.approx(2.0 / np.sqrt(3))
    assert found["learned"] is found["applied_norm"]["learned"] is None
    math = found["curvature"]["math"]
    assert math["gamma"] == pytest.approx([1.0, 1.0, 1.0])
    # Losses that bend alike are bent alike on the way to a mixture and to any expert.
    assert math["gap"]["uniform"] == pytest.approx(0.0, abs=1e-15)
    assert math["gap"]["rank_correlation"] == pytest.approx(1.0)
    # Every expert's own second order, 0.02 / 2, is what the first order misses of its loss.
    assert math["expansion_error"] == pytest.approx(0.0, abs=1e-12)
    assert found["verdict"]["regime"] == "beyond"
    (broken,) = [reason for reason in found["verdict"]["reasons"] if "one domain alone" in reason]
    assert broken == found["verdict"]["reasons"][0], "and no measured limit is"


def test_a_diagnosis_says_which_mixture_was_learned(path: Path) -> None:
    config = with_experts(path)
    mixture = {"math": 1.0, "code": 0.0, "web": 0.0}
    result = {"mixture": mixture, "digests": search_digests(config)}
    publish_json(RunDir(config.run_dir).result, result)
    found = diagnosis_of(config, measured(config))
    assert found["learned"] == mixture
    assert found["applied_norm"]["learned"] > 0


def test_expansions_are_checked_at_every_expert_and_at_equal_shares() -> None:
    matrix = component_matrix(2, 0.5, uniform(2))
    merges = merges_to_check(matrix, ["a", "b"])
    assert merges[:2] == [{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}]
    assert merges[2] == pytest.approx({"a": 0.5, "b": 0.5})
