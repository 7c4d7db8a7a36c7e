"""A whole experiment of four experts with mixtures of their own over three domains, on two ranks.

Its search asks for mixtures; every proxy is the affine merge that stands for one of them, and what
it scores is what the merged checkpoint scores.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_mergemix.cli import main
from megatron_mergemix.config import load_config
from megatron_mergemix.search.journal import read_journal
from megatron_mergemix.training_runs.experiment_runs import expert_checkpoints
from megatron_mergemix.training_runs.mixtures import component_matrix
from megatron_mergemix.trials import Scores, Trial
from tests.support.experiment import DOMAINS, write_experiment
from tests.support.forked_jobs import run_verb
from tests.support.run_distributed import run_distributed
from tests.support.weights import read_weights

pytestmark = pytest.mark.timeout(900)

COMPONENTS = {
    "algebra": {"math": 0.8, "prose": 0.2},
    "hack": {"code": 1.0},
    "novel": {"prose": 0.7, "math": 0.3},
    "all": "uniform",
}
AFFINE = {"algebra": 1.25, "hack": -0.5, "novel": 0.25}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the YAML of an experiment that ``mergemix run`` went through, and what it printed."""
    home = tmp_path_factory.mktemp("components")
    path = write_experiment(home, {"references": {}})
    settings = yaml.safe_load(path.read_text())
    settings["experts"] = {"tokens": 5120, "lr": 2e-3, "components": COMPONENTS}
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path, run_verb(path, "run")


def trials_of(path: Path) -> list[Trial]:
    return read_journal(load_config(path).run_dir / "search" / "trials.jsonl")[1]


def result_of(path: Path) -> dict[str, Any]:
    text = (load_config(path).run_dir / "search" / "result.json").read_text()
    result: dict[str, Any] = json.loads(text)
    return result


def vector(mixture: dict[str, float] | Any) -> np.ndarray:
    return np.array([mixture[name] for name in DOMAINS])


def test_every_expert_is_trained_on_its_row(ran: tuple[Path, str]) -> None:
    config = load_config(ran[0])
    folders = {path.name for path in (config.run_dir / "experts").iterdir() if path.is_dir()}
    assert folders == set(COMPONENTS)
    blends = {}
    for name in COMPONENTS:
        run = json.loads((config.run_dir / "experts" / name / "run.json").read_text())
        blends[name] = [part["weight"] for part in run["description"]["blend"]]
    assert blends["algebra"] == pytest.approx([0.8, 0.2])
    assert blends["hack"] == [1.0]
    assert blends["all"] == pytest.approx([1 / 3] * 3, abs=1e-6)


def test_every_proxy_is_the_shortest_affine_merge_that_stands_for_its_mixture(
    ran: tuple[Path, str],
) -> None:
    matrix = component_matrix(load_config(ran[0]))
    trials = trials_of(ran[0])
    assert trials[0].merge_weights == dict.fromkeys(COMPONENTS, 0.0)
    inverse = np.linalg.pinv(matrix)
    for trial in trials[1:]:
        assert list(trial.merge_weights) == list(COMPONENTS)
        alpha = np.array(list(trial.merge_weights.values()))
        np.testing.assert_allclose(alpha @ matrix, vector(trial.mixture), atol=1e-9)
        np.testing.assert_allclose(alpha, vector(trial.mixture) @ inverse, atol=1e-9)
    assert min(min(trial.merge_weights.values()) for trial in trials) < -0.1


def test_the_design_is_of_mixtures_and_its_vertices_are_pure_domains(
    ran: tuple[Path, str],
) -> None:
    vertices = [trial for trial in trials_of(ran[0]) if trial.purpose == "vertex"]
    assert sorted(vector(trial.mixture).tolist() for trial in vertices) == np.eye(3)[::-1].tolist()


def test_the_result_and_the_blend_are_the_mixture_and_alpha_is_said(ran: tuple[Path, str]) -> None:
    config, result = load_config(ran[0]), result_of(ran[0])
    blend = yaml.safe_load((config.run_dir / "blend" / "blend.yaml").read_text())
    assert blend["mixture"] == result["mixture"]
    assert list(result["mixture"]) == list(DOMAINS)
    assert list(result["merge_weights"]) == list(COMPONENTS)
    alpha = np.array(list(result["merge_weights"].values()))
    reached = alpha @ component_matrix(config)
    np.testing.assert_allclose(reached, vector(result["mixture"]), atol=1e-9)
    assert result["merge_weights_norm"] == pytest.approx(float(np.linalg.norm(alpha)))


def test_lines_and_table_show_the_mixture_and_say_alpha(ran: tuple[Path, str]) -> None:
    lines = ran[1].splitlines()
    [vertex] = [line for line in lines if "math 1.00 code 0.00 prose 0.00" in line]
    [trial] = [trial for trial in trials_of(ran[0]) if trial.mixture.get("math") == 1.0]
    size = np.linalg.norm(list(trial.merge_weights.values()))
    listed = " ".join(f"{name} {weight:.2f}" for name, weight in trial.merge_weights.items())
    assert f"|  alpha {listed} (norm {size:.2f})  |" in vertex
    result = result_of(ran[0])
    assert "norm of alpha" in ran[1]
    assert any(
        line.startswith("merge weights of the mixture that was taken: alpha algebra ")
        and line.rstrip().endswith(f"(norm {result['merge_weights_norm']:.2f})")
        for line in lines
    )


def test_tensorboard_has_mixture_and_merge_weights_by_their_names(ran: tuple[Path, str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(load_config(ran[0]).run_dir / "tensorboard" / "search"))
    events.Reload()
    for trial in trials_of(ran[0])[1:]:
        for group, values in (("mixture", trial.mixture), ("merge_weights", trial.merge_weights)):
            for name, value in values.items():
                shown = {event.step: event.value for event in events.Scalars(f"{group}/{name}")}
                assert shown[trial.index] == pytest.approx(value, abs=1e-6)
        norms = {event.step: event.value for event in events.Scalars("merge_weights_norm")}
        size = float(np.linalg.norm(list(trial.merge_weights.values())))
        assert norms[trial.index] == pytest.approx(size, rel=1e-6)


# ---- a proxy is what it says it is ----


def apply_and_score(config_path: Path, folder: Path) -> dict[str, Any]:
    """Apply single experts and an affine merge; score a merged checkpoint by itself."""
    from megatron_mergemix.evaluate.make import make_evaluator
    from megatron_mergemix.megatron import parallel
    from megatron_mergemix.megatron.dist_checkpoint import load_model
    from megatron_mergemix.megatron.model import build_model
    from megatron_mergemix.megatron.resident import ResidentProxy
    from megatron_mergemix.model_facts import vocab_size
    from megatron_mergemix.training_runs.experiment_runs import base_checkpoint

    config = load_config(config_path)
    parallel.start(config.parallel)
    chunks = build_model(config, vocab_size(config), seed=3)
    experts = expert_checkpoints(config)
    proxy = ResidentProxy(chunks, base_checkpoint(config), experts)

    def weights() -> dict[str, np.ndarray]:
        return {name: tensor.double().numpy().copy() for name, tensor in proxy._live}

    applied, loaded = {}, {}
    for name in experts:
        proxy.apply({**dict.fromkeys(experts, 0.0), name: 1.0})
        applied[name] = weights()
    proxy.apply(AFFINE)
    applied["affine"] = weights()
    for name, path in experts.items():
        load_model(path, chunks)
        loaded[name] = weights()
    assert config.model is not None
    evaluator = make_evaluator(config, config.model.padded_vocab(vocab_size(config)))
    scores = evaluator.evaluate(ResidentProxy(chunks, folder, experts={}))
    return {"applied": applied, "loaded": loaded, "scores": scores}


@pytest.fixture(scope="module")
def merged(ran: tuple[Path, str]) -> tuple[Path, list[dict[str, Any]]]:
    """Return the checkpoint of the recommended merge, and what two ranks make of everything."""
    out = ran[0].parent / "merged"
    assert main(["merge", "--config", str(ran[0]), "--from-search", f"--output={out}"]) == 0
    return out, run_distributed(apply_and_score, 2, ran[0], out / "release")


def test_the_recommended_proxy_scored_as_its_merged_checkpoint(
    ran: tuple[Path, str], merged: tuple[Path, list[dict[str, Any]]]
) -> None:
    result = result_of(ran[0])
    place = result["alternatives"][result["source"]]["trial"]
    trial = next(trial for trial in trials_of(ran[0]) if trial.index == place)
    for seen in merged[1]:
        assert values(seen["scores"]) == pytest.approx(values(trial.scores), rel=1e-6)
    origin = json.loads((merged[0] / "mergemix.json").read_text())
    assert list(origin["experts"]) == list(COMPONENTS)


def values(scores: Scores) -> dict[str, float]:
    return {
        f"{capability} {metric}": score.value
        for capability, metrics in scores.items()
        for metric, score in metrics.items()
    }


def test_one_expert_alone_is_that_expert_bit_for_bit(
    merged: tuple[Path, list[dict[str, Any]]],
) -> None:
    for seen in merged[1]:
        for name in COMPONENTS:
            for tensor, weight in seen["loaded"][name].items():
                np.testing.assert_array_equal(seen["applied"][name][tensor], weight)


def test_negative_merge_weights_extrapolate(merged: tuple[Path, list[dict[str, Any]]]) -> None:
    for seen in merged[1]:
        for tensor, found in seen["applied"]["affine"].items():
            exact = sum(weight * seen["loaded"][name][tensor] for name, weight in AFFINE.items())
            np.testing.assert_allclose(found, exact, rtol=1e-6, atol=1e-7)


def test_merge_takes_weights_by_the_experts_names(ran: tuple[Path, str], tmp_path: Path) -> None:
    common = ["merge", "--config", str(ran[0]), f"--output={tmp_path / 'out'}"]
    assert main([*common, "--alpha", *(f"{name}={w}" for name, w in AFFINE.items())]) == 0
    experts = {name: read_weights(p) for name, p in expert_checkpoints(load_config(ran[0])).items()}
    for tensor, found in read_weights(tmp_path / "out" / "release").items():
        exact = sum(weight * experts[name][tensor] for name, weight in AFFINE.items())
        np.testing.assert_allclose(found, exact, rtol=1e-6, atol=1e-7)


def test_a_domain_is_no_expert_and_a_changed_row_is_named(
    ran: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(ran[0])
    assert main(["merge", "--config", path, "--alpha", "math=1", f"--output={tmp_path}/o"]) == 1
    known = ", ".join(COMPONENTS)
    assert f"--alpha: 'math' is no expert: {known}." in capsys.readouterr().err
    changed = "experts.components.algebra={math: 0.7, prose: 0.3}"
    assert main(["search", path, "--set", changed]) == 1
    message = capsys.readouterr().err
    assert "experts/algebra holds another run: blend." in message
    assert "math.weight: 0.8 -> 0.7" in message
