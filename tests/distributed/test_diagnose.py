"""``mergemix diagnose``: measured on two ranks, kept on record, continued, shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_mergemix.checkpoint.metadata import read_index
from megatron_mergemix.cli import main
from megatron_mergemix.config import load_config
from megatron_mergemix.diagnosis.regime import UPDATES
from megatron_mergemix.training_runs.experiment_runs import base_checkpoint, expert_checkpoints
from tests.support.forked_jobs import run_verb

DOMAINS = ["math", "code", "prose"]
TASK = {"sequences": 9, "metric": "bpb"}


@pytest.fixture(scope="module", autouse=True)
def on_cpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGEMIX_DEVICE", "cpu")
        yield


@pytest.fixture(scope="module")
def experiment(trained_experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the YAML of given experts; one capability is named after a domain, one is not."""
    home = tmp_path_factory.mktemp("diagnose")
    config = load_config(trained_experiment)
    data = trained_experiment.parent / "data"
    settings = yaml.safe_load(trained_experiment.read_text())
    settings["run_dir"] = str(home / "run")
    settings["base"] = {"checkpoint": str(base_checkpoint(config))}
    experts = {name: str(path) for name, path in expert_checkpoints(config).items()}
    settings["experts"]["checkpoints"] = experts
    settings["evaluate"]["capabilities"] = {
        "math": {"loss": {"prefixes": [str(data / "math_heldout")], **TASK}},
        "all": {"loss": {"prefixes": [str(data / f"{n}_heldout") for n in DOMAINS], **TASK}},
    }
    path = home / "mix.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def diagnosed(experiment: Path) -> dict[str, Any]:
    """Return what the verb left after one start."""
    run_verb(experiment, "diagnose")
    return result_of(experiment)


def result_of(path: Path) -> dict[str, Any]:
    text = (path.parent / "run" / "diagnose" / "result.json").read_text()
    found: dict[str, Any] = json.loads(text)
    return found


def test_task_vectors_are_those_of_the_checkpoints(experiment: Path, diagnosed) -> None:
    from megatron_mergemix.merge.compare import compare

    config = load_config(experiment)
    folders = [base_checkpoint(config), *expert_checkpoints(config).values()]
    offline = compare([read_index(folder) for folder in folders])
    np.testing.assert_allclose(diagnosed["cosines"], offline["cosines"], atol=1e-9)
    np.testing.assert_allclose(diagnosed["norms"], [n["all"] for n in offline["norms"]])
    np.testing.assert_allclose(diagnosed["delta"], offline["delta"])
    assert diagnosed["experts"] == DOMAINS
    norms = diagnosed["applied_norm"]
    assert 0 < norms["uniform"] < min(diagnosed["applied_norm_along"]["vertices"].values())
    assert norms["proportional"] != norms["uniform"]
    assert norms["learned"] is None, "there was no search"


def test_a_loss_is_measured_for_every_capability_and_every_other_domain(diagnosed) -> None:
    found = diagnosed["curvature"]
    assert {name: loss["source"] for name, loss in found.items()} == {
        "math": "held-out data",
        "all": "held-out data",
        "code": "training data",
        "prose": "training data",
    }
    assert [loss["windows"] for loss in found.values()] == [9, 9, 64, 64]
    for name, loss in found.items():
        assert (loss["gap"] is None) == (loss["gamma"] is None) == (name == "all")
        assert max(loss["disagreements"]) < 0.02
        # Ten steps with a large learning rate, and yet the second order explains most of it.
        assert loss["expansion_error"] < 0.4
    for number, name in enumerate(DOMAINS):
        loss = found[name]
        assert np.argmin(loss["first_order"]) == number, "an expert helps its own domain most"
        assert loss["gamma"][number] == pytest.approx(1.0)
        assert loss["gap"]["learned"] is None
        assert abs(loss["gap"]["uniform"]) <= abs(loss["gap"]["largest"])


def test_the_verdict_has_reasons(diagnosed) -> None:
    verdict = diagnosed["verdict"]
    far = max(diagnosed["delta"]) > UPDATES[1]
    assert verdict["regime"] == ("open" if far else "within")
    assert any("went further than any" in reason for reason in verdict["reasons"]) == far
    assert "That study is of a toy" in verdict["reasons"][-1]


def test_on_record_it_is_shown_without_any_rank(
    experiment: Path, diagnosed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_mergemix.launch import diagnosis

    def no_start(*words: Any, **options: Any) -> None:
        raise AssertionError("nothing is left to measure")

    monkeypatch.setattr(diagnosis, "start", no_start)
    assert main(["diagnose", str(experiment), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == diagnosed
    assert main(["diagnose", str(experiment)]) == 0
    shown = capsys.readouterr().out
    assert "diagnose: on record already" in shown
    for title in ("task vectors:", "norm of the applied", "predicted gap, in theory", "verdict: "):
        assert title in shown


def test_after_an_interruption_only_what_is_missing_is_measured(
    experiment: Path, diagnosed
) -> None:
    path = experiment.parent / "run" / "diagnose" / "measured.json"
    record = json.loads(path.read_text())
    del record["losses"]["all"]  # of the fewest windows
    path.write_text(json.dumps(record))
    out = experiment.parent / "out.json"
    shown = run_verb(experiment, "diagnose", "--json", str(out))
    assert "diagnose: loss of math" not in shown
    assert "diagnose: loss of all" in shown
    again = json.loads(out.read_text())
    assert again["verdict"] == diagnosed["verdict"]
    for name, loss in diagnosed["curvature"].items():
        np.testing.assert_allclose(
            again["curvature"][name]["second_order"], loss["second_order"], rtol=1e-3, atol=1e-4
        )
