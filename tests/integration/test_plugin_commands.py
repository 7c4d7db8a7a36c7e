"""Commands and merges by name in the plugin's stages, inside the real ``pretrain_gpt.py``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megatron_mergemix.training_runs.experiment_runs import base_checkpoint
from tests.support import distance_command
from tests.support.megatron_lm import each_checkout
from tests.support.plugin import DP2, PP2, Launches

pytestmark = pytest.mark.timeout(900)


@each_checkout()
def test_a_merge_by_name_is_scored_as_its_candidate_was(checkout: Path, launches: Launches) -> None:
    done = launches.stage("evaluate", *DP2, "--mergemix-model", "mixture:uniform", ranks=1)
    assert done.returncode == 0, done.stdout
    path = Path(done.stdout.split("mergemix: written to ")[1].split("\n")[0])
    record = json.loads(path.read_text())
    uniform = next(trial for trial in launches.trials() if trial.purpose == "prior:uniform")
    assert record["merge_weights"] == pytest.approx(uniform.merge_weights)
    for name, metrics in uniform.scores.items():
        for metric, score in metrics.items():
            found = record["scores"][name][metric]["value"]
            assert found == pytest.approx(score.value, rel=1e-5)
    again = launches.stage("evaluate", "--mergemix-model", "mixture:uniform")
    assert again.returncode == 0
    assert "mixture uniform is scored already" in again.stdout


@each_checkout()
def test_a_command_scores_the_candidates_of_a_launch(checkout: Path, launches: Launches) -> None:
    base = base_checkpoint(launches.settings())
    home = launches.home / "calls of a command"
    home.mkdir()
    words = [sys.executable, distance_command.__file__, str(home), str(base)]
    command = {
        "run": [*words, "{checkpoint}", "{output}"],
        "metrics": ["distance.l2"],
        "higher_is_better": False,
    }
    other = launches.on_same_experts("commands", {"far": {"command": command}})
    done = other.stage("search", *PP2, ranks=2)
    assert done.returncode == 0, done.stdout
    trials = other.trials()
    assert all(trial.error is None for trial in trials)
    for trial in trials:
        found = trial.scores["far"]["distance.l2"].value
        assert found == pytest.approx(trial.task_vector_norm, rel=1e-4, abs=1e-5)
    result = json.loads((other.run_dir / "search" / "result.json").read_text())
    assert set(result["held_out"]["as_searched"]) == {"far"}
    assert "recommended" in result["held_out"]["models"]
