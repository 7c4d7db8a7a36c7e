"""What is refused before any job is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_mergemix.config import load_config
from megatron_mergemix.errors import ConfigError
from tests.support.untrained import write_config


def refusal(tmp_path: Path, slurm: dict[str, Any], processes: int = 1) -> str:
    path = write_config(tmp_path, {"slurm": slurm, "parallel": {"processes": processes}})
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return str(caught.value)


def test_ranks_have_to_be_nodes_times_gpus(tmp_path: Path) -> None:
    message = refusal(tmp_path, {"nodes": 2, "gpus_per_node": 8}, 8)
    assert "parallel.processes is 8, expected 16" in message
    assert "slurm.nodes 2 x slurm.gpus_per_node 8" in message


def test_ranks_have_to_fill_the_nodes_equally(tmp_path: Path) -> None:
    message = refusal(tmp_path, {"nodes": 3}, 2)
    assert "parallel.processes is 2, expected a multiple of slurm.nodes 3" in message


@pytest.mark.parametrize("limit", ["8h", "1:2:3:4", "", "1-", "-5"])
def test_a_time_limit_that_sbatch_would_refuse(tmp_path: Path, limit: str) -> None:
    assert f"slurm.time.expert is {limit!r}" in refusal(tmp_path, {"time": {"expert": limit}})


@pytest.mark.parametrize("limit", ["90", "30:00", "8:00:00", "1-0", "2-12:30:00", "unlimited"])
def test_time_limits_that_sbatch_takes(tmp_path: Path, limit: str) -> None:
    config = load_config(write_config(tmp_path, {"slurm": {"time": {"search": limit}}}))
    assert config.slurm is not None
    assert config.slurm.time.search == limit


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"partition": "gpu"}, "slurm.options.partition is written by slurm.partition; set that"),
        ({"output": "x"}, "slurm.options.output is set by mergemix"),
        ({"--mem": "0"}, "expected a long name without '--'"),
        ({"comment": "two\nlines"}, "slurm.options.comment has a line break"),
    ],
)
def test_options_that_would_break_a_job(
    tmp_path: Path, options: dict[str, str], words: str
) -> None:
    assert words in refusal(tmp_path, {"options": options})


def test_setup_is_one_line_each(tmp_path: Path) -> None:
    message = refusal(tmp_path, {"setup": ["module load cuda", "a\nb"]})
    assert "slurm.setup[1] has a line break" in message
