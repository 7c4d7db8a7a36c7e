"""What is queued for launches of the user's own, and how they get on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_mergemix.config import Config, load_config
from megatron_mergemix.errors import ConfigError, MergeMixError
from megatron_mergemix.launch import verbs
from megatron_mergemix.launch.status import Status, statuses
from megatron_mergemix.launch.submit import submit
from megatron_mergemix.model_facts import with_recorded_launch
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.training_runs.experiment_runs import requested_run
from tests.support.finished import finish_references, finish_search, losses
from tests.support.launch import after_a_launch, write_launch
from tests.support.torch_dist import write_checkpoint
from tests.unit.launch.test_submit import AFTER, PENDING, Cluster, finish

ALL = ("experts/math", "experts/code", "experts/web")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_launch(tmp_path, {"nodes": 2})


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster(tmp_path / "bin", tmp_path / "run")
    monkeypatch.setenv("PATH", f"{cluster.home}:/usr/bin:/bin")
    return cluster


def of(path: Path, piece: str) -> Status:
    config = with_recorded_launch(load_config(path))
    [found] = [row for row in statuses(config) if row.piece == piece]
    return found


def test_everything_is_queued_before_the_model_is_known(
    path: Path, tmp_path: Path, cluster: Cluster
) -> None:
    big = tmp_path / "big.sbatch"
    big.write_text("#!/bin/bash\n")
    submit(path, [], validate=True, then=big)
    assert cluster.calls() == [
        "sbatch --parsable slurm/experts.sbatch",
        f"sbatch --parsable --dependency=afterok:11 {AFTER}/search.sbatch",
        f"sbatch --parsable --dependency=afterok:12 {AFTER}/blend.sbatch",
        f"sbatch --parsable --dependency=afterok:12 {AFTER}/references.sbatch",
        f"sbatch --parsable --dependency=afterok:14 {AFTER}/validation.sbatch",
        f"sbatch --parsable --dependency=afterok:13 --kill-on-invalid-dep=yes {big}",
    ]
    settings = load_config(tmp_path / "run" / "slurm" / "config.json")
    assert settings == load_config(path)
    record = json.loads((tmp_path / "run" / "slurm" / "jobs.json").read_text())
    assert record["experts/web"]["task"] == "11_2"


def test_what_is_done_is_not_queued_again(path: Path, tmp_path: Path, cluster: Cluster) -> None:
    submit(path, [])
    cluster.calls()
    config = after_a_launch(path)
    finish(config, *ALL[:2])
    cluster.queue({"11_2": "FAILED"})
    submit(path, [])
    assert [call.split("/")[-1] for call in cluster.calls()] == [
        *("experts.sbatch", "search.sbatch", "blend.sbatch"),
    ]
    assert "#SBATCH --array=2\n" in (tmp_path / "run" / "slurm" / "experts.sbatch").read_text()
    finish(config, *ALL)
    finish_search(config)
    submit(path, [])
    assert cluster.calls() == ["sbatch --parsable slurm/blend.sbatch"]
    verbs.blend(path, [])
    submit(path, [])
    assert cluster.calls() == []
    finish_references(config, dict.fromkeys(("learned", "uniform"), losses(1, 2, 3)))
    row = of(path, "validation")
    assert (row.state, row.detail) == (
        "stopped",
        "2 of 3 reference models trained and scored; start it again to continue",
    )
    assert of(path, "references/uniform").state == "done"
    assert of(path, "references/proportional").state == "waiting"


def test_what_a_first_launch_puts_on_record_are_no_other_settings(
    path: Path, cluster: Cluster
) -> None:
    submit(path, [])
    cluster.calls()
    after_a_launch(path)
    cluster.queue({"11_0": "RUNNING", **dict.fromkeys(("11_1", "11_2", "12", "13"), PENDING)})
    submit(path, [])
    assert cluster.calls() == []
    with pytest.raises(MergeMixError, match="jobs with other settings are in the queue"):
        submit(path, ["launch.command=torchrun -m megatron_mergemix.launch other.py"])


def test_a_launch_that_cannot_be_a_job_is_refused_before_anything(
    path: Path, tmp_path: Path, cluster: Cluster
) -> None:
    with pytest.raises(ConfigError, match="has neither torchrun nor python"):
        submit(path, ["launch.command=bash train.sh"])
    with pytest.raises(ConfigError, match="launch.command is missing"):
        submit(path, ["launch.command=null"])
    assert cluster.calls() == []
    assert not (tmp_path / "run").exists()


def test_a_dry_run_prints_jobs_that_can_be_read(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(path, [], dry_run=True)
    shown = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert (
        '    --mergemix-config "$config" --mergemix-stage expert --mergemix-expert "$expert" &\n'
    ) in shown
    assert "--nnodes=2 --rdzv-backend=c10d" in shown
    assert max(len(line) for line in shown.splitlines() if str(tmp_path) not in line) <= 100


# ---- how they get on ----


def begin(config: Config, name: str, step: int) -> None:
    run = requested_run(config, name)
    run.mark_started()
    if step:
        write_checkpoint(run.checkpoints / f"iter_{step:07d}", {})
        (run.checkpoints / "latest_checkpointed_iteration.txt").write_text(str(step))


def test_before_the_first_launch_everything_waits(path: Path, tmp_path: Path) -> None:
    rows = statuses(load_config(path))
    assert [row.piece for row in rows] == [*ALL, "search", "blend"]
    assert {(row.state, row.detail) for row in rows} == {("waiting", "not started")}
    assert not (tmp_path / "run").exists()


def test_a_launch_is_at_the_step_of_its_last_save(path: Path) -> None:
    config = after_a_launch(path)
    begin(config, "experts/math", 6)
    begin(config, "experts/code", 0)
    finish(config, "experts/web")
    assert of(path, "experts/web") == Status("experts/web", "done")
    with RunDir(config.run_dir).lock("experts/math"):
        row = of(path, "experts/math")
    assert (row.state, row.detail.split(" (")[0]) == ("running", "step 6 of 11")
    assert of(path, "experts/math").detail == "step 6 of 11; start it again to continue"
    assert of(path, "experts/code").detail == "step 0 of 11; start it again to continue"


def test_a_failed_launch_is_told_with_what_the_stage_left(
    path: Path, tmp_path: Path, cluster: Cluster
) -> None:
    submit(path, [])
    begin(after_a_launch(path), "experts/math", 6)
    log = RunDir(tmp_path / "run").log("slurm-experts-11_0")
    log.write_text("much\n")
    log.with_suffix(".error").write_text("rank 0: OutOfMemoryError: CUDA out of memory\nmore\n")
    cluster.queue({"11_0": "FAILED", "11_1": "PENDING|Resources"})
    row = of(path, "experts/math")
    assert (row.state, row.job, row.log) == ("failed", "11_0", str(log))
    assert row.detail == (
        f"step 6 of 11 FAILED: rank 0: OutOfMemoryError: CUDA out of memory ({log})"
    )
    assert of(path, "experts/code").detail == "PENDING (Resources)"


def test_a_reference_under_way_is_the_validation_running(path: Path) -> None:
    config = after_a_launch(path)
    finish(config, *ALL)
    finish_search(config)
    begin(config, "references/uniform", 3)
    for lock in ("references/uniform", "evaluate/uniform"):
        with RunDir(config.run_dir).lock(lock):
            row = of(path, "validation")
            reference, other = of(path, "references/uniform"), of(path, "references/learned")
        assert reference.state == "running"
        assert reference.detail.startswith("step 3 of 11 (process ")
        assert other.state == "waiting"
        assert row.state == "running"
        assert row.detail.startswith("0 of 3 reference models trained and scored (process ")
