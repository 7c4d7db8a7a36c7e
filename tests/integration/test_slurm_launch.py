"""An experiment whose stages are launches of the real ``pretrain_gpt.py``, on a SLURM of two nodes.

Experts and search are launched with torchrun, one per node, and leave after three steps, so that
the jobs of experts have to queue themselves again. The reference is launched as Python alone, one
task for each GPU of a node.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.test_slurm import MISSING, PATIENCE
from tests.support.megatron_lm import each_checkout, training_losses
from tests.support.plugin import STEPS, Launches
from tests.support.slurm_cluster import SlurmCluster

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"NOT TESTED: SLURM is not here ({', '.join(MISSING)}); "
        "as root: apt-get install slurm-wlm munge",
    ),
]

EXPERTS = ("math", "code")
LEAVES_AFTER = 3
WORLD = "using world size: 2, data-parallel size: 2"


@dataclass
class Story:
    """What was seen on the way."""

    launches: Launches
    outputs: list[str] = field(default_factory=list)
    after_leaving: dict[str, dict[str, Any]] = field(default_factory=dict)
    at_the_end: dict[str, dict[str, Any]] = field(default_factory=dict)
    survivors: list[str] = field(default_factory=list)

    def log(self, job: str) -> str:
        return (self.launches.run_dir / "logs" / f"slurm-{job}.log").read_text()


def command(launches: Launches, starter: Sequence[str], *more: str) -> str:
    """Return a launch of Python as text."""
    script = launches._script(("--save-interval", "2", *more))
    return shlex.join([sys.executable, *starter, "-m", launches.launcher, *script])


def write(launches: Launches) -> None:
    """Make a base, and an experiment of two domains whose ranks are on two nodes."""
    launches.write()
    settings = yaml.safe_load(launches.config.read_text())
    for section in (settings["domains"], settings["evaluate"]["capabilities"]):
        del section["prose"]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
    settings["launch"]["command"] = command(
        launches, torchrun, "--exit-interval", str(LEAVES_AFTER)
    )
    settings["slurm"] = {"nodes": 2, "cpus_per_node": 1}
    settings["references"] = {"uniform": "uniform"}
    launches.config.write_text(yaml.safe_dump(settings, sort_keys=False))


@pytest.fixture(scope="session")
def story(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Run the experiment on the cluster; return what was seen."""
    launches = Launches(checkout, tmp_path_factory.mktemp("slurm-launch"))
    write(launches)
    story, config = Story(launches), launches.config
    with SlurmCluster() as cluster:
        story.outputs.append(cluster.mergemix(config, "submit"))
        restart_both_experts(cluster, story)
        blend = launches.run_dir / "blend" / "blend.yaml"
        cluster.wait_for(blend, config, PATIENCE)
        alone = f"--set=launch.command={command(launches, ())}"
        words = ("--validate", alone, "--set=slurm.gpus_per_node=1")
        story.outputs.append(cluster.mergemix(config, "submit", *words))
        result = launches.run_dir / "validate" / "result.json"
        cluster.wait_for(result, config, PATIENCE)
        story.outputs.append(cluster.mergemix(config, "submit", *words))
        story.at_the_end = cluster.status(config)
    story.survivors = [" ".join(process.cmdline()) for process in cluster.processes()]
    return story


def restart_both_experts(cluster: SlurmCluster, story: Story) -> None:
    """Wait until the experts have queued themselves again, and start them at once."""
    for place in range(len(EXPERTS)):
        task = f"1_{place}"
        log = story.launches.run_dir / "logs" / f"slurm-experts-{task}.log"
        cluster.wait_until(
            lambda log=log: log.exists() and "queued again" in log.read_text(), PATIENCE
        )
        cluster.wait_until(lambda task=task: cluster.state(task) == "PENDING")
    story.after_leaving = cluster.status(story.launches.config)
    for place in range(len(EXPERTS)):
        cluster.start_requeued(f"1_{place}")


@each_checkout()
def test_launches_of_the_user_s_own_end_with_a_blend(checkout: Path, story: Story) -> None:
    words = (story.launches.run_dir / "blend" / "data_path.txt").read_text().split()
    assert words[0] == "--data-path"
    assert sum(float(word) for word in words[1:-2:2]) == pytest.approx(1)
    assert {row["state"] for row in story.at_the_end.values()} == {"done"}
    assert list(story.at_the_end) == [
        *("experts/math", "experts/code", "search", "blend"),
        *("references/uniform", "validation"),
    ]


@each_checkout()
def test_a_launch_that_left_early_goes_on_in_a_new_run_of_its_job(
    checkout: Path, story: Story
) -> None:
    for place, name in enumerate(EXPERTS):
        row = story.after_leaving[f"experts/{name}"]
        assert row["state"] == "waiting"
        assert row["detail"].startswith(f"step {LEAVES_AFTER} of {STEPS} PENDING")
        log = story.log(f"experts-1_{place}")
        first, second = log.split("queued again, to continue from the last save\n")
        assert f"experts/{name} stopped after step {LEAVES_AFTER} of {STEPS}" in first
        assert min(training_losses(second)) == LEAVES_AFTER + 1
        assert f"experts/{name} is trained: " in second


@each_checkout()
def test_the_ranks_of_a_launch_were_on_two_nodes(checkout: Path, story: Story) -> None:
    folder = story.launches.run_dir / "slurm"
    for job in ("experts", "search"):
        text = re.sub(r" *\\\n *", " ", (folder / f"{job}.sbatch").read_text())  # lines as read
        assert "torch.distributed.run --nnodes=2 --rdzv-backend=c10d" in text
        assert "--standalone" not in text
    for log in ("experts-1_0", "experts-1_1", "search-2"):
        assert WORLD in story.log(log)


@each_checkout()
def test_python_alone_is_a_rank_for_each_gpu(checkout: Path, story: Story) -> None:
    text = (story.launches.run_dir / "slurm" / "references.sbatch").read_text()
    assert "torch.distributed" not in text
    assert "#SBATCH --gpus-per-node=1\n" in text
    log = story.log("references-5_0")
    assert log.count(WORLD) == 3  # trained, and scored, as is the merge beside it
    scores = story.launches.run_dir / "references" / "uniform" / "scores.json"
    assert set(json.loads(scores.read_text())["scores"]) == set(EXPERTS)


@each_checkout()
def test_what_is_done_is_not_submitted_again(checkout: Path, story: Story) -> None:
    first, second, third = story.outputs
    assert re.findall(r"^(.*): job (\d)", first, re.M) == [
        ("experts/math, experts/code", "1"),
        ("search", "2"),
        ("blend", "3"),
    ]
    # Number 4 went to the first task of the array, when it began.
    assert re.findall(r"^(.*): job (\d)", second, re.M) == [
        ("references/uniform", "5"),
        ("validation", "6"),
    ]
    assert "job " not in third


@each_checkout()
def test_no_process_is_left(checkout: Path, story: Story) -> None:
    assert story.survivors == []
