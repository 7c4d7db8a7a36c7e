"""One search under every layout: the same trials, and scores that are those of the checkpoints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_mergemix.config import load_config
from megatron_mergemix.search.journal import read_journal
from megatron_mergemix.training_runs.experiment_runs import base_checkpoint, expert_checkpoints
from megatron_mergemix.trials import Scores, Trial, scores_of
from tests.support.run_distributed import run_distributed

SHARE, PAPER = 0.25, 0.0
"""General share: mixtures that need negative merge weights, and the paper's plain simplex."""

NUM_DESIGN = 12


def overrides(config_path: Path, run_dir: Path, share: float, **layout: int) -> list[str]:
    """Return overrides that search the given experts in a run_dir of its own."""
    config = load_config(config_path)
    experts = {name: str(path) for name, path in expert_checkpoints(config).items()}
    return [
        f"run_dir={run_dir}",
        f"base={{checkpoint: {base_checkpoint(config)}}}",
        f"experts.checkpoints={experts}",
        f"experts.general_share={share}",
        *(f"parallel.{name}={value}" for name, value in layout.items()),
    ]


def search_under(config_path: Path, wanted: Sequence[Sequence[str]], num_own: int) -> list[Any]:
    """Search once for every list of overrides; return the scores of each checkpoint by itself.

    The first ``num_own`` searches are followed by scoring base and experts without any merge.
    """
    from megatron.core import parallel_state

    from megatron_mergemix.evaluate.make import make_evaluator
    from megatron_mergemix.jobs import search
    from megatron_mergemix.megatron import parallel
    from megatron_mergemix.megatron.model import build_model
    from megatron_mergemix.megatron.resident import ResidentProxy
    from megatron_mergemix.model_facts import vocab_size

    own = []
    for number, changes in enumerate(wanted):
        config = load_config(config_path, changes)
        parallel.start(config.parallel)
        search.search(config)
        if number < num_own:
            assert config.model is not None
            rows = config.model.padded_vocab(vocab_size(config))
            evaluator = make_evaluator(config, rows)
            chunks = build_model(config, vocab_size(config), seed=3)
            alone = {"base": base_checkpoint(config), **expert_checkpoints(config)}
            own.append(
                {
                    name: evaluator.evaluate(ResidentProxy(chunks, base=path, experts={}))
                    for name, path in alone.items()
                }
            )
        parallel_state.destroy_model_parallel()
    return own


@pytest.fixture(scope="module")
def searched(
    trained_experiment: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, list[Trial]], dict[str, Scores], dict[str, dict[str, Scores]]]:
    """Return the trials by layout, what base and experts score without any merge, and, by layout,
    the experts that the search has left on record."""
    home = tmp_path_factory.mktemp("layouts")

    def wanted(name: str, share: float, **layout: int) -> list[str]:
        return overrides(trained_experiment, home / name, share, **layout)

    two = [
        wanted("paper", PAPER, processes=2, tensor=2),
        wanted("tensor", SHARE, processes=2, tensor=2),
        wanted("pipeline", SHARE, processes=2, tensor=1, pipeline=2),
        wanted("data", SHARE, processes=2, tensor=1),
    ]
    one = [wanted("one", SHARE, processes=1, tensor=1)]
    own = run_distributed(search_under, 2, trained_experiment, two, 1)
    assert own[0] == own[1], "every rank must have the same scores"
    run_distributed(search_under, 1, trained_experiment, one, 0)
    trials = {
        name: read_journal(home / name / "search" / "trials.jsonl")[1]
        for name in ("paper", "tensor", "pipeline", "data", "one")
    }
    on_record = {name: experts_on_record(home / name) for name in trials}
    return trials, own[0][0], on_record


def experts_on_record(run_dir: Path) -> dict[str, Scores]:
    records = [json.loads(path.read_text()) for path in (run_dir / "evaluate").glob("*.json")]
    return {r["name"].removeprefix("expert "): scores_of(r["scores"]) for r in records}


@pytest.mark.parametrize("layout", ["tensor", "pipeline", "data"])
def test_the_design_is_measured_alike_under_every_layout(searched, layout: str) -> None:
    expected, found = searched[0]["one"], searched[0][layout]
    assert len(expected) > NUM_DESIGN
    for trial, other in zip(expected[: NUM_DESIGN + 1], found, strict=False):
        assert (trial.index, trial.purpose) == (other.index, other.purpose)
        assert trial.mixture == other.mixture
        assert trial.merge_weights == other.merge_weights
        assert trial.task_vector_norm == pytest.approx(other.task_vector_norm, rel=1e-6)
        assert _values(other.scores) == pytest.approx(_values(trial.scores), rel=1e-5)


@pytest.mark.parametrize("layout", ["tensor", "pipeline", "data"])
def test_the_verified_candidates_agree_under_every_layout(searched, layout: str) -> None:
    """They are optima of surrogates fitted to the scores, so rounding may move them a little."""
    expected, found = (searched[0][name][NUM_DESIGN + 1 :] for name in ("one", layout))
    assert [trial.purpose for trial in found] == [trial.purpose for trial in expected]
    for trial, other in zip(expected, found, strict=True):
        assert other.mixture == pytest.approx(trial.mixture, abs=2e-3)
        assert _values(other.scores) == pytest.approx(_values(trial.scores), rel=1e-3)


@pytest.mark.parametrize("layout", ["one", "tensor", "pipeline", "data"])
def test_experts_that_are_no_trial_are_scored_at_the_end_as_their_checkpoints(
    searched, layout: str
) -> None:
    _, own, on_record = searched
    assert {"base", *on_record[layout]} == set(own)
    for name, scores in on_record[layout].items():
        assert _values(scores) == pytest.approx(_values(own[name]), rel=1e-5)


def test_experts_that_are_trials_are_not_scored_again(searched) -> None:
    assert searched[2]["paper"] == {}


def test_the_design_reaches_beyond_plain_averages(searched) -> None:
    """Or the comparison of layouts would not see an affine merge."""
    assert any(min(trial.merge_weights.values()) < 0 for trial in searched[0]["tensor"])


def _values(scores: Scores) -> dict[str, float]:
    return {
        f"{capability} {metric} {name}": value
        for capability, metrics in scores.items()
        for metric, score in metrics.items()
        for name, value in [("value", score.value), ("stderr", score.stderr)]
    }


def test_a_pure_domain_without_general_share_scores_as_its_expert(searched) -> None:
    trials, own, _ = searched
    vertices = {
        max(trial.mixture, key=trial.mixture.__getitem__): trial
        for trial in trials["paper"]
        if trial.purpose == "vertex"
    }
    assert set(vertices) == {"math", "code", "prose"}
    for name, trial in vertices.items():
        assert sorted(trial.merge_weights.values()) == [0.0, 0.0, 1.0]
        assert trial.scores == own[name]


def test_the_base_trial_scores_as_the_base(searched) -> None:
    trials, own, _ = searched
    for name in ("paper", "tensor"):
        assert trials[name][0].purpose == "base"
        assert trials[name][0].task_vector_norm == 0.0
        assert trials[name][0].scores == own["base"]
