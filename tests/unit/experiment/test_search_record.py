"""What counts as the record of this very search."""

from __future__ import annotations

from pathlib import Path

from megatron_mergemix.experiment.digests import search_digests
from megatron_mergemix.experiment.search_record import search_result
from megatron_mergemix.files.publishing import publish_json
from megatron_mergemix.run_dir import RunDir
from tests.support.untrained import (
    with_experts,
)


def test_a_result_counts_only_with_the_same_digests(config_path: Path) -> None:
    config = with_experts(config_path)
    assert search_result(config) is None
    result = {"mixture": {"math": 1.0}, "digests": search_digests(config)}
    publish_json(RunDir(config.run_dir).result, result)
    assert search_result(config) == result
    assert search_result(with_experts(config_path, "search.seed=1")) is None
