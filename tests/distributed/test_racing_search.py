"""A search with a first share, as a job: on two ranks, cut within a wave of the race, continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_mergemix.evaluate.first_items import first_count
from megatron_mergemix.search.journal import read_journal
from megatron_mergemix.trials import Trial
from tests.distributed.test_search_layouts import SHARE, overrides
from tests.support.run_distributed import run_distributed

TRIALS = 12
SETTINGS = f"search={{trials: {TRIALS}, surrogate: gp, first_share: 0.5}}"


def search_twice(config_path: Path, home: Path) -> Any:
    """Search, then once more from a journal that ends within the second trial of the race.

    Returns the scores of the first raced candidate, measured on all windows at once.
    """
    import torch.distributed as dist

    from megatron_mergemix.config import load_config
    from megatron_mergemix.evaluate.make import make_evaluator
    from megatron_mergemix.jobs.search import search
    from megatron_mergemix.megatron import parallel
    from megatron_mergemix.megatron.model import build_model
    from megatron_mergemix.megatron.resident import ResidentProxy
    from megatron_mergemix.model_facts import vocab_size
    from megatron_mergemix.processes.distributed import rank
    from megatron_mergemix.training_runs.experiment_runs import base_checkpoint, expert_checkpoints

    def config_of(name: str) -> Any:
        layout = {"processes": 2, "tensor": 1}
        wanted = overrides(config_path, home / name, SHARE, **layout)
        return load_config(config_path, [*wanted, SETTINGS])

    config = config_of("whole")
    parallel.start(config.parallel)
    search(config)
    if rank() == 0:
        lines = journal_of(home / "whole").read_bytes().splitlines(keepends=True)
        raced = [n for n, line in enumerate(lines) if b'"purpose": "race:1"' in line]
        path = journal_of(home / "continued")
        path.parent.mkdir(parents=True)
        path.write_bytes(b"".join(lines[: raced[1]]) + lines[raced[1]][:100])
    dist.barrier()
    search(config_of("continued"))
    evaluator = make_evaluator(config, config.model.padded_vocab(vocab_size(config)))
    chunks = build_model(config, vocab_size(config), seed=8)
    proxy = ResidentProxy(chunks, base_checkpoint(config), expert_checkpoints(config))
    first = next(t for t in read_journal(journal_of(home / "whole"))[1] if t.purpose == "race:1")
    proxy.apply(first.merge_weights)
    return evaluator.evaluate(proxy)


def journal_of(run_dir: Path) -> Path:
    return run_dir / "search" / "trials.jsonl"


@pytest.fixture(scope="module")
def searched(
    trained_experiment: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, list[Trial]], Any]:
    home = tmp_path_factory.mktemp("racing-search")
    ranks = run_distributed(search_twice, 2, trained_experiment, home, timeout=300)
    assert ranks[0] == ranks[1], "every rank must have the same scores"
    found = {name: read_journal(journal_of(home / name))[1] for name in ("whole", "continued")}
    return found, ranks[0]


def test_the_design_is_scored_on_half_of_the_windows_and_some_on_the_others(searched) -> None:
    trials = searched[0]["whole"]
    (all_windows,) = {m["loss"].num_samples for m in trials[0].scores.values()}
    partial = [trial for trial in trials if trial.first is not None]
    raced = [trial for trial in trials if trial.purpose.startswith("race:")]
    assert len(partial) == TRIALS - 5  # the three domains and both priors
    assert 2 <= len(raced) < len(partial)
    for trial in trials:
        expected = all_windows if trial.first is None else first_count(all_windows, trial.first)
        for metrics in trial.scores.values():
            assert metrics["loss"].num_samples == expected, trial.purpose


def test_what_was_scored_in_two_parts_is_what_one_pass_gives(searched) -> None:
    trials, at_once = searched
    first = next(trial for trial in trials["whole"] if trial.purpose == "race:1")
    for capability, metrics in at_once.items():
        for metric, score in metrics.items():
            found = first.scores[capability][metric]
            assert found.items == pytest.approx(score.items, rel=1e-5)
            assert found.value == pytest.approx(score.value, rel=1e-6)
            assert found.stderr == pytest.approx(score.stderr, rel=1e-4)


def test_a_search_that_was_cut_within_a_wave_ends_where_it_would_have_ended(searched) -> None:
    whole, continued = searched[0]["whole"], searched[0]["continued"]
    assert [t.purpose for t in continued] == [t.purpose for t in whole]
    for one, other in zip(whole, continued, strict=True):
        assert (one.first, one.mixture) == (other.first, other.mixture)
        assert one.scores == other.scores
