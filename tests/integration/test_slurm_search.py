"""A search and its blend as jobs of a real SLURM of two nodes, from experts that are there.

The long stories, with jobs that are requeued and killed, are ``test_slurm.py`` and
``test_slurm_launch.py``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from megatron_mergemix.config import load_config
from megatron_mergemix.training_runs.experiment_runs import base_checkpoint, expert_checkpoints
from tests.support.slurm_cluster import SlurmCluster, missing_programs

MISSING = missing_programs()

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"NOT TESTED: SLURM is not here ({', '.join(MISSING)}); "
        "as root: apt-get install slurm-wlm munge",
    ),
]


@dataclass
class Story:
    """What was seen on the way."""

    run_dir: Path
    outputs: Sequence[str]
    states: Sequence[str]
    queue: str
    survivors: Sequence[str]


@pytest.fixture(scope="module")
def story(trained_experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Submit, wait for the blend, submit again."""
    home = tmp_path_factory.mktemp("slurm")
    given = load_config(trained_experiment)
    settings = yaml.safe_load(trained_experiment.read_text())
    experts = {name: str(path) for name, path in expert_checkpoints(given).items()}
    settings |= {
        "run_dir": str(home / "run"),
        "base": {"checkpoint": str(base_checkpoint(given))},
        "experts": {"checkpoints": experts},
        "search": {"trials": 8, "surrogate": "gp"},
        "slurm": {"nodes": 2, "cpus_per_node": 1},
        "references": {},
    }
    config = trained_experiment.with_name("slurm.yaml")  # paths are beside it
    config.write_text(yaml.safe_dump(settings, sort_keys=False))
    with SlurmCluster() as cluster:
        outputs = [cluster.mergemix(config, "submit")]
        cluster.wait_for(home / "run" / "blend" / "blend.yaml", config, timeout=300)
        states = [row["state"] for row in cluster.status(config).values()]
        outputs.append(cluster.mergemix(config, "submit"))
        queue = cluster.run("squeue", "--array", "--states=all", "--noheader", "--format=%i %T")
    survivors = [" ".join(process.cmdline()) for process in cluster.processes()]
    return Story(home / "run", outputs, states, queue, survivors)


def test_the_jobs_end_with_a_blend(story: Story) -> None:
    words = (story.run_dir / "blend" / "data_path.txt").read_text().split()
    assert words[0] == "--data-path"
    result = json.loads((story.run_dir / "search" / "result.json").read_text())
    shares = [share for share in result["mixture"].values() if share > 0]
    assert [float(word) for word in words[1:-2:2]] == pytest.approx(shares, abs=1e-6)
    assert set(story.states) == {"done"}
    assert story.survivors == []


def test_what_is_there_and_what_is_done_is_no_job(story: Story) -> None:
    first, second = story.outputs
    assert "search: job 1\nblend: job 2, after 1\n" in first
    assert "job " not in second
    assert story.queue.split() == ["1", "COMPLETED", "2", "COMPLETED"]


def test_the_ranks_of_the_search_were_on_two_nodes(story: Story) -> None:
    text = (story.run_dir / "slurm" / "search.sbatch").read_text()
    assert "--nnodes=2 --nproc-per-node=1" in text
    [log] = (path.read_text() for path in story.run_dir.glob("logs/slurm-search*.log"))
    assert "resident: base and 3 experts" in log
