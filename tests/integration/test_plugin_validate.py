"""``mergemix validate`` where the stages are launches of the real ``pretrain_gpt.py``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.megatron_lm import each_checkout
from tests.support.plugin import DP2, STEPS, Launches
from tests.support.processes import mergemix

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]


@each_checkout()
def test_a_reference_and_its_merge_are_trained_scored_and_compared_by_launches(
    checkout: Path, launches: Launches
) -> None:
    ours = launches.with_settings("validate", {"references": {"even": "uniform"}})
    command = json.dumps([sys.executable, *ours._command(DP2, ranks=1)])
    shown = []
    for _ in range(2):
        words = ("validate", f"--set=launch.command={command}")
        with mergemix(ours.config, *words, environment=ours._environment()) as started:
            assert started.end() == 0, started.stdout + started.stderr
            shown.append(started.stdout)
    assert "mergemix: references/even is trained" in shown[0]
    assert "mergemix: mixture even" in shown[0]
    assert "mergemix: " not in shown[1]  # no launch at all
    result = json.loads((ours.run_dir / "validate" / "result.json").read_text())
    [row] = result["references"]
    uniform = next(trial for trial in ours.trials() if trial.purpose == "prior:uniform")
    for name, metrics in row["proxy"]["scores"].items():
        for metric, value in metrics.items():
            assert value == pytest.approx(uniform.scores[name][metric].value, rel=1e-5)
    trained = json.loads((ours.run_dir / "references" / "even" / "scores.json").read_text())
    for name, metrics in row["scores"].items():
        for metric, value in metrics.items():
            assert value == trained["scores"][name][metric]["value"]
    costs = result["costs"]
    assert costs["proxies"]["tokens"] == 3 * costs["references"]["tokens"] == 3 * STEPS * 4 * 32
    assert 0 < trained["seconds"] < costs["references"]["seconds"]
    assert costs["proxies"]["training_seconds"] > 0
