"""The paths of an experiment, and what is put on record."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_mergemix.run_dir import RunDir


def test_every_path_lies_below_the_root_and_nothing_is_created(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    paths = {
        run_dir.base: "base",
        run_dir.expert("math"): "experts/math",
        run_dir.reference("uniform"): "references/uniform",
        run_dir.cache: "cache",
        run_dir.config: "config.json",
        run_dir.trials: "search/trials.jsonl",
        run_dir.result: "search/result.json",
        run_dir.blend: "blend",
        run_dir.validation: "validate/result.json",
        run_dir.report: "report.html",
        run_dir.slurm: "slurm",
        run_dir.tensorboard("experts/math"): "tensorboard/experts/math",
        run_dir.log("search"): "logs/search.log",
    }
    assert {path.relative_to(run_dir.root).as_posix() for path in paths} == set(paths.values())
    assert not run_dir.root.exists()


def test_settings_go_on_record_but_not_over_those_of_a_verb_at_work(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.put_on_record({"seed": 1})
    assert json.loads(run_dir.config.read_text()) == {"seed": 1}
    with run_dir.lock("run"):
        run_dir.put_on_record({"seed": 7})
    assert json.loads(run_dir.config.read_text()) == {"seed": 1}
    run_dir.put_on_record({"seed": 7})
    assert json.loads(run_dir.config.read_text()) == {"seed": 7}
