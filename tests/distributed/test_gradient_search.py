"""A search along gradients, as a job: in shares of domains, under any layout, continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_mergemix.search.journal import read_journal
from megatron_mergemix.trials import Trial
from tests.distributed.test_search_layouts import SHARE, overrides
from tests.support.run_distributed import run_distributed

STEPS = 3
LAYOUTS = {
    "tensor": {"processes": 2, "tensor": 2},
    "data": {"processes": 2, "tensor": 1},
}
STEP = 0.04


def wanted(config_path: Path, run_dir: Path, layout: str) -> list[str]:
    """Return the overrides of one search; experts saw a part of the general mixture."""
    settings = f"search={{strategy: gradient, steps: {STEPS}, minibatch: 0.5, surrogate: gp}}"
    return [*overrides(config_path, run_dir, SHARE, **LAYOUTS[layout]), settings]


def search_and_differ(config_path: Path, home: Path) -> dict[str, Any]:
    """Search under every layout; return differences of the first minibatch's losses."""
    from megatron.core import parallel_state

    from megatron_mergemix.config import load_config
    from megatron_mergemix.jobs.search import search
    from megatron_mergemix.megatron import parallel

    for layout in LAYOUTS:
        config = load_config(config_path, wanted(config_path, home / layout, layout))
        parallel.start(config.parallel)
        search(config)
        found = differences(config, trials_of(home / layout))
        parallel_state.destroy_model_parallel()
    continue_cut_journal(config_path, home)
    return found


def differences(config: Any, trials: list[Trial]) -> dict[str, dict[str, float]]:
    """Return by capability how its loss changes where a domain takes share of the next one."""
    from megatron_mergemix.evaluate.make import make_evaluator
    from megatron_mergemix.experiment.strategy import merge_weights_of
    from megatron_mergemix.megatron.model import build_model
    from megatron_mergemix.megatron.resident import ResidentProxy
    from megatron_mergemix.model_facts import vocab_size
    from megatron_mergemix.training_runs.experiment_runs import base_checkpoint, expert_checkpoints

    chunks = build_model(config, vocab_size(config), seed=8)
    evaluator = make_evaluator(config, config.model.padded_vocab(vocab_size(config)))
    proxy = ResidentProxy(chunks, base_checkpoint(config), expert_checkpoints(config))
    weights = merge_weights_of(config)
    first = next(trial for trial in trials if trial.gradient is not None)
    assert first.gradient is not None

    def losses(gaining: str, losing: str, step: float) -> dict[str, float]:
        mixture = dict(first.mixture)
        mixture[gaining] += step
        mixture[losing] -= step
        proxy.apply(weights(mixture))
        scores = evaluator.gradients(proxy, first.gradient.minibatch)[0]
        return {name: metrics["bpb"].value for name, metrics in scores.items()}

    found: dict[str, dict[str, float]] = {name: {} for name in first.gradient.scores}
    domains = list(config.domains)
    for gaining, losing in zip(domains, [*domains[1:], domains[0]], strict=True):
        sides = {s: losses(gaining, losing, s * STEP) for s in (-2, -1, 1, 2)}
        for name in found:
            near, far = (sides[s][name] - sides[-s][name] for s in (1, 2))
            found[name][f"{gaining} {losing}"] = (8 * near - far) / (12 * STEP)
    return found


def continue_cut_journal(config_path: Path, home: Path) -> None:
    """Search again from a journal that ends within the second gradient's line."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_mergemix.config import load_config
    from megatron_mergemix.jobs.search import search
    from megatron_mergemix.megatron import parallel
    from megatron_mergemix.processes.distributed import rank

    if rank() == 0:
        lines = (home / "data" / "search" / "trials.jsonl").read_bytes().splitlines(keepends=True)
        derived = [n for n, line in enumerate(lines) if b'"purpose": "gradient:2"' in line]
        path = home / "continued" / "search" / "trials.jsonl"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"".join(lines[: derived[0]]) + lines[derived[0]][:100])
    dist.barrier()
    config = load_config(config_path, wanted(config_path, home / "continued", "data"))
    parallel.start(config.parallel)
    search(config)
    parallel_state.destroy_model_parallel()


def trials_of(run_dir: Path) -> list[Trial]:
    return read_journal(run_dir / "search" / "trials.jsonl")[1]


@pytest.fixture(scope="module")
def searched(
    trained_experiment: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, list[Trial]], dict[str, dict[str, float]]]:
    home = tmp_path_factory.mktemp("gradient-search")
    ranks = run_distributed(search_and_differ, 2, trained_experiment, home, timeout=300)
    assert ranks[0] == ranks[1]
    return {name: trials_of(home / name) for name in (*LAYOUTS, "continued")}, ranks[0]


def test_the_slopes_are_those_of_the_losses_in_shares_of_domains(searched) -> None:
    trials, differences = searched
    gradient = next(trial.gradient for trial in trials["data"] if trial.gradient is not None)
    assert set(differences) == {"math", "code", "prose"}
    for capability, expected in differences.items():
        slope = gradient.slopes[capability]["bpb"]
        largest = max(map(abs, expected.values()))
        for pair, difference in expected.items():
            gaining, losing = pair.split()
            found = slope[gaining] - slope[losing]
            assert found == pytest.approx(difference, rel=1e-3, abs=1e-3 * largest), capability


def test_every_layout_takes_the_same_steps(searched) -> None:
    tensor, data = searched[0]["tensor"], searched[0]["data"]
    assert [trial.purpose for trial in tensor] == [trial.purpose for trial in data]
    assert sum(trial.gradient is not None for trial in data) == STEPS
    for one, other in zip(tensor, data, strict=True):
        assert one.mixture == pytest.approx(dict(other.mixture), abs=1e-4)
        if one.gradient is not None:
            assert one.scores == {}
            assert one.gradient.minibatch == other.gradient.minibatch


def test_a_search_that_was_cut_within_a_step_ends_where_it_would_have_ended(searched) -> None:
    whole, continued = searched[0]["data"], searched[0]["continued"]
    for one, other in zip(whole, continued, strict=True):
        assert (one.purpose, one.mixture) == (other.purpose, other.mixture)
        assert one.gradient == other.gradient
        assert one.scores == other.scores
