"""A stage that was started by hand leaves its settings for who reads the run directory."""

from __future__ import annotations

from pathlib import Path

from megatron_mergemix.config import load_config
from megatron_mergemix.megatron_lm.hooks import _put_on_record
from megatron_mergemix.run_dir import RunDir
from tests.support.untrained import write_config


def test_a_stage_writes_its_settings_but_not_over_those_of_a_verb_at_work(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    config = load_config(path)
    run_dir = RunDir(config.run_dir)
    _put_on_record(config)
    assert load_config(run_dir.config) == config
    with run_dir.lock("run"):
        _put_on_record(load_config(path, ["search.seed=7"]))
    assert load_config(run_dir.config) == config
    _put_on_record(load_config(path, ["search.seed=7"]))
    assert load_config(run_dir.config).search.seed == 7
