"""Tasks of lm-eval in the plugin's stages, inside the real ``pretrain_gpt.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import lm_eval_tasks
from tests.support.megatron_lm import each_checkout
from tests.support.plugin import PP2, TP2, Launches, assert_same_scores

pytestmark = pytest.mark.timeout(900)


def with_tasks(launches: Launches, name: str, **more: Any) -> Launches:
    """Return the same experts with questions, texts and answers to write beside the losses."""
    folder = launches.home / "tasks"
    lm_eval_tasks.write(folder)
    tasks = {
        "choice": {**lm_eval_tasks.LETTERS, "num_fewshot": 0},  # the model sees 32 bytes
        "rolling": lm_eval_tasks.ROLLING,
        "written": lm_eval_tasks.WRITTEN,
    }
    capabilities = {
        kind: {"lm_eval": {"tasks": [lm_eval_tasks.write_task(folder, task)]}}
        for kind, task in tasks.items()
    }
    # So small a model gives the same answers, whatever it was trained on.
    weights = {"choice": 0.0, "written": 0.0}
    return launches.on_same_experts(name, capabilities, weights, **more)


@each_checkout()
def test_tasks_are_scored_alike_under_every_layout(checkout: Path, launches: Launches) -> None:
    found = {}
    for name, layout in (("tensor", TP2), ("pipeline", PP2)):
        own = with_tasks(launches, f"tasks-{name}", tokenizer={"kind": "byte"})
        done = own.stage("search", *layout, ranks=2)
        assert done.returncode == 0, done.stdout
        found[name] = own.trials()
        result = json.loads((own.run_dir / "search" / "result.json").read_text())
        assert set(result["mixture"]) == {"math", "code", "prose"}
    for trial in found["tensor"]:
        assert trial.error is None
        assert {"own_letters/acc", "own_letters/gold_bpb"} <= set(trial.scores["choice"])
        assert trial.scores["rolling"]["own_rolling/bits_per_byte"].value > 0
    assert_same_scores(found["tensor"], found["pipeline"], rtol=1e-4)


@each_checkout()
def test_a_launch_without_the_name_of_its_tokenizer_is_refused(
    checkout: Path, launches: Launches
) -> None:
    own = with_tasks(launches, "tasks-nameless")
    done = own.stage("search", ranks=1)
    assert done.returncode == 1
    assert "tokenizer is missing: the launch has its own, but tasks of lm-eval" in done.stdout
