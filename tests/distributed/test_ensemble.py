"""The experts' token probabilities: measured under every layout, and used by the search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mergemix.config import load_config
from megatron_mergemix.experiment.strategy import expert_ensemble
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.search.journal import read_journal
from tests.distributed.test_search_layouts import PAPER, SHARE, overrides
from tests.support.run_distributed import run_distributed

NAMES = ["math", "code", "prose"]


def search_each(config_path: Path, wanted: list[list[str]]) -> None:
    """Search for every list of overrides; then again, with one expert's file gone."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_mergemix.jobs import search
    from megatron_mergemix.megatron import parallel

    for changes in wanted:
        config = load_config(config_path, changes)
        run_dir = RunDir(config.run_dir)
        parallel.start(config.parallel)
        search.search(config)
        if dist.get_rank() == 0:
            run_dir.result.rename(run_dir.root / "first.json")
            run_dir.expert_tokens("code").rename(run_dir.root / "first.npz")
        dist.barrier()
        search.search(config)
        parallel_state.destroy_model_parallel()


@pytest.fixture(scope="module")
def searched(trained_experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the configs by name after two searches each."""
    home = tmp_path_factory.mktemp("ensembles")
    layouts = {
        "paper": (PAPER, {"tensor": 1, "pipeline": 2}),
        "share": (SHARE, {"tensor": 2}),
    }
    changes = {
        name: [
            *overrides(trained_experiment, home / name, share, processes=2, **layout),
            "search.ensemble=true",
        ]
        for name, (share, layout) in layouts.items()
    }
    run_distributed(search_each, 2, trained_experiment, list(changes.values()))
    return {name: load_config(trained_experiment, each) for name, each in changes.items()}


def test_a_single_expert_is_predicted_to_have_the_loss_it_has(searched) -> None:
    config = searched["paper"]
    ensemble = expert_ensemble(config)
    domains = list(config.domains)
    vertices = [
        trial
        for trial in read_journal(RunDir(config.run_dir).trials)[1]
        if trial.purpose == "vertex"
    ]
    assert len(vertices) == len(domains)
    for trial in vertices:
        point = np.array([[trial.mixture[name] for name in domains]])
        for capability, metrics in trial.scores.items():
            assert -ensemble(capability, point)[0] == pytest.approx(metrics["loss"].value, abs=1e-5)


def test_layouts_measure_the_same_probabilities(searched) -> None:
    """Experts are the same checkpoints; a pipeline and tensor ranks round differently."""
    points = np.array([[0.2, 0.3, 0.5], [0.6, 0.4, 0.0]])
    tables = []
    for config in searched.values():
        ensemble = expert_ensemble(config)
        ensemble._matrix = np.eye(3)  # what the same weights of the experts give
        tables.append([ensemble(name, points) for name in config.evaluate.capabilities])
    assert np.array(tables[0]) == pytest.approx(np.array(tables[1]), abs=1e-5)


def test_a_file_that_is_gone_is_measured_again_alone_and_alike(searched) -> None:
    for config in searched.values():
        run_dir = RunDir(config.run_dir)
        with (
            np.load(run_dir.root / "first.npz") as first,
            np.load(run_dir.expert_tokens("code")) as again,
        ):
            assert set(first.files) == set(again.files) > {"digests"}
            assert all((first[key] == again[key]).all() for key in first.files)
        kept = run_dir.expert_tokens("math").stat().st_mtime
        assert kept < run_dir.expert_tokens("code").stat().st_mtime


def test_the_result_tells_where_it_helped_and_is_the_same_again(searched) -> None:
    for config in searched.values():
        run_dir = RunDir(config.run_dir)
        first, again = (
            json.loads(path.read_text()) for path in (run_dir.root / "first.json", run_dir.result)
        )
        for evidence in first["surrogates"].values():
            assert set(evidence["ensemble"]) == {"rho", "rmse", "rmse_without", "used"}
        del first["seconds"], again["seconds"]
        assert first == again
