"""An experiment on a real SLURM of two nodes: submitted, killed twice, and finished.

One running expert is requeued by the cluster; a rank of another one is killed, so that its job
fails, what waits for it is dropped, and the experiment is submitted again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from megatron_mergemix.search.journal import read_journal
from tests.support.experiment import write_experiment
from tests.support.processes import is_helper
from tests.support.slurm_cluster import SlurmCluster, missing_programs

MISSING = missing_programs()

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
STEPS = 100
PATIENCE = 300.0
REFERENCES = (
    "--set=references={uniform: uniform, some: {math: 0.7, code: 0.3}, learned: learned}",
    "--set=validation.space_filling=0",
)


@dataclass
class Story:
    """What was seen on the way."""

    home: Path
    config: Path
    outputs: list[str] = field(default_factory=list)
    after_failure: dict[str, dict[str, Any]] = field(default_factory=dict)
    at_the_end: dict[str, dict[str, Any]] = field(default_factory=dict)
    queue: str = ""
    survivors: list[str] = field(default_factory=list)
    validated: str = ""

    @property
    def run_dir(self) -> Path:
        return self.home / "a run"  # sbatch reads its options in quotes as well

    def log(self, job: str) -> str:
        return (self.run_dir / "logs" / f"slurm-{job}.log").read_text()


def write_settings(directory: Path) -> Path:
    """Write a tensor-parallel experiment of two domains whose ranks are on two nodes."""
    changes = {
        "training": {"save_interval": 10, "log_interval": 1},
        "base": {"train": {"tokens": 5120, "lr": 5e-3}},
        "experts": {"tokens": 512 * STEPS, "lr": 2e-3},
        "search": {"trials": 8, "surrogate": "gp"},
        "slurm": {"nodes": 2, "cpus_per_node": 1, "time": {"expert": "10:00"}},
        "references": {},
        "run_dir": "a run",
    }
    path = write_experiment(directory, changes)
    settings = yaml.safe_load(path.read_text())
    for section in (settings["domains"], settings["evaluate"]["capabilities"]):
        del section["prose"]
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Run the experiment on the cluster; return what was seen."""
    home = tmp_path_factory.mktemp("slurm")
    story = Story(home, write_settings(home))
    with SlurmCluster() as cluster:
        story.outputs.append(cluster.mergemix(story.config, "submit"))
        kill_both_experts(cluster, story)
        story.after_failure = cluster.status(story.config)
        story.outputs.append(cluster.mergemix(story.config, "submit"))
        blend = story.run_dir / "blend" / "blend.yaml"
        cluster.wait_for(blend, story.config, PATIENCE)
        story.at_the_end = cluster.status(story.config)
        story.outputs.append(cluster.mergemix(story.config, "submit"))
        cluster.wait_until(lambda: not cluster.run("squeue", "--noheader").strip())
        story.queue = cluster.run("squeue", "--array", "--states=all", "--format=%i %T")
        story.validated = cluster.mergemix(story.config, "submit", "--validate", *REFERENCES)
        cluster.wait_for(story.run_dir / "validate" / "result.json", story.config, PATIENCE)
    story.survivors = [" ".join(process.cmdline()) for process in cluster.processes()]
    return story


def kill_both_experts(cluster: SlurmCluster, story: Story) -> None:
    """Requeue one expert, as the cluster does when a node fails, and kill a rank of the other."""
    experts = story.run_dir / "experts"
    for name in EXPERTS:
        saved = experts / name / "checkpoints" / "latest_checkpointed_iteration.txt"
        cluster.wait_until(lambda saved=saved: saved.exists(), PATIENCE)
    [rank] = ranks(cluster, "experts/code", "1")
    rank.kill()
    cluster.run("scontrol", "requeue", "2_0")
    for name in EXPERTS:
        assert not (experts / name / "finished.json").exists(), "the kill came too late"
    cluster.start_requeued("2_0")
    cluster.wait_until(lambda: cluster.state("2_1") not in ("RUNNING", "COMPLETING"))
    assert cluster.state("2_1") == "FAILED", story.log("experts-2_1")


def ranks(cluster: SlurmCluster, run: str, number: str) -> Iterator[psutil.Process]:
    for process in cluster.processes():
        words = process.cmdline()
        is_worker = (
            "megatron_mergemix.jobs.worker" in words and "torch.distributed.run" not in words
        )
        is_wanted = run in words and process.environ().get("RANK") == number
        if is_worker and is_wanted and not is_helper(process):
            yield process


def test_the_chain_ends_with_a_blend(story: Story) -> None:
    words = (story.run_dir / "blend" / "data_path.txt").read_text().split()
    assert words[0] == "--data-path"
    shares = [float(word) for word in words[1:-2:2]]
    assert sum(shares) == pytest.approx(1)
    assert {row["state"] for row in story.at_the_end.values()} == {"done"}


def test_a_requeued_job_continues_and_keeps_its_log(story: Story) -> None:
    log = story.log("experts-2_0")
    assert "experts/math: continues from step " in log
    assert log.count(f"experts/math: {STEPS}/{STEPS} ") == 1
    finished = json.loads((story.run_dir / "experts" / "math" / "finished.json").read_text())
    assert finished["steps"] == STEPS


def test_a_killed_rank_fails_its_job_and_status_says_so(story: Story) -> None:
    row = story.after_failure["experts/code"]
    assert (row["state"], row["job"]) == ("failed", "2_1")
    assert f" of {STEPS} FAILED: " in row["detail"]
    assert row["detail"].endswith("logs/slurm-experts-2_1.log)")
    assert "What is finished is kept: mend the cause and submit it again." in story.log(
        "experts-2_1"
    )


def test_submitting_again_queues_what_failed_and_what_waits_for_it(story: Story) -> None:
    first, second, third = story.outputs
    assert "experts/math, experts/code: job 2, after 1\n" in first
    assert "search: job 3, after 1, 2\n" in first
    assert "base: already done\nexperts/math: already in the queue as job 2_0\n" in second
    # Number 5 went to the first task of the array, when it began.
    assert "experts/code: job 6\nsearch: job 7, after 2_0, 6\nblend: job 8, after 7\n" in second
    assert "job " not in third
    assert "experts/code: continues from step " in story.log("experts-6_1")


def test_nothing_runs_twice(story: Story) -> None:
    states = dict(line.split() for line in story.queue.splitlines()[1:])
    ended_well = sorted(job for job, state in states.items() if state == "COMPLETED")
    assert ended_well == ["1", "2_0", "6_1", "7", "8"]
    _, trials = read_journal(story.run_dir / "search" / "trials.jsonl")
    assert [trial.index for trial in trials] == list(range(len(trials)))
    assert len(trials) > 8


def test_the_ranks_of_a_job_were_on_two_nodes(story: Story) -> None:
    settings = json.loads((story.run_dir / "slurm" / "config.json").read_text())
    assert settings["parallel"]["processes"] == settings["slurm"]["nodes"] == 2
    text = (story.run_dir / "slurm" / "search.sbatch").read_text()
    assert "--nnodes=2 --nproc-per-node=1" in text


def test_references_are_trained_side_by_side_and_compared_with_their_proxies(story: Story) -> None:
    named = "references/uniform, references/some, references/learned: job 9\n"
    assert named in story.validated
    assert "validation: job 10, after 9\n" in story.validated
    assert "#SBATCH --array=0-2" in (story.run_dir / "slurm" / "references.sbatch").read_text()
    result = json.loads((story.run_dir / "validate" / "result.json").read_text())
    assert {row["name"] for row in result["references"]} == {"uniform", "some", "learned"}
    for place, name in enumerate(("uniform", "some", "learned")):
        assert f"references/{name}: {STEPS}/{STEPS} " in story.log(f"references-9_{place}")


def test_no_process_is_left(story: Story) -> None:
    assert story.survivors == []
