"""How every piece gets on, with and without a cluster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_mergemix.config import Config, load_config
from megatron_mergemix.experiment.digests import search_digests
from megatron_mergemix.files.publishing import publish_json
from megatron_mergemix.launch.status import Status, status, statuses
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.training_runs.experiment_runs import requested_run
from tests.support.finished import (
    finish_reference,
    finish_references,
    finish_search,
    losses,
    score_proxy,
)
from tests.support.untrained import with_base, write_config
from tests.unit.launch.test_submit import Cluster, finish


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return with_base(write_config(tmp_path))


def of(config: Config, piece: str) -> Status:
    [found] = [row for row in statuses(config) if row.piece == piece]
    return found


def begin(config: Config, name: str, step: int) -> None:
    run = requested_run(config, name)
    run.mark_started()
    publish_json(run.directory / "progress.json", {"step": step, "total": run.steps})


def test_without_any_file_everything_waits_and_nothing_is_written(config: Config) -> None:
    rows = statuses(config)
    assert [row.piece for row in rows] == [
        *("experts/math", "experts/code", "experts/web", "search", "blend"),
    ]
    assert {(row.state, row.detail) for row in rows} == {("waiting", "not started")}
    assert not config.run_dir.exists()


def test_experts_of_ones_own_have_their_names(tmp_path: Path) -> None:
    rows = "{algebra: {math: 0.8, web: 0.2}, code: {code: 1.0}, web: {web: 1.0}, all: uniform}"
    config = with_base(write_config(tmp_path), f"experts.components={rows}")
    finish(config, "experts/algebra")
    begin(config, "experts/all", 4)
    rows_shown = {row.piece: row.state for row in statuses(config)}
    assert rows_shown == {
        "experts/algebra": "done",
        "experts/code": "waiting",
        "experts/web": "waiting",
        "experts/all": "stopped",
        "search": "waiting",
        "blend": "waiting",
    }


def test_a_run_that_holds_its_lock_is_running_at_a_step(config: Config) -> None:
    begin(config, "experts/code", 4)
    with RunDir(config.run_dir).lock("experts/code"):
        row = of(config, "experts/code")
        assert row.state == "running"
        assert row.detail.startswith("step 4 of 11 (process ")
        assert of(config, "experts/math").state == "waiting"
    assert of(config, "experts/code") == Status(
        "experts/code", "stopped", "step 4 of 11; start it again to continue"
    )


def test_a_local_failure_is_told_with_its_reason_and_log(config: Config) -> None:
    begin(config, "experts/code", 4)
    log = RunDir(config.run_dir).log("train")
    log.parent.mkdir(parents=True)
    log.touch()
    log.with_suffix(".error").write_text("rank 1: the loss is nan\nThe traceback is elsewhere.\n")
    row = of(config, "experts/code")
    assert (row.state, row.log) == ("failed", str(log))
    assert row.detail == f"step 4 of 11: rank 1: the loss is nan ({log})"


def test_messages_with_brackets_are_shown_as_they_are(
    tmp_path: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(config, "experts/code", 4)
    log = RunDir(config.run_dir).log("train")
    log.parent.mkdir(parents=True)
    log.with_suffix(".error").write_text("[/pytorch/gloo/pair.cc:534] Connection closed [rank1]\n")
    base = tmp_path / "given" / "base" / "iter_0000001"
    status(tmp_path / "mix.yaml", [f"base={{checkpoint: {base}}}"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "[/pytorch/gloo/pair.cc:534] Connection closed [rank1]" in shown


def test_a_finished_run_is_done(config: Config) -> None:
    finish(config, "experts/math")
    assert of(config, "experts/math") == Status("experts/math", "done")


def test_what_holds_another_run_says_so(tmp_path: Path, config: Config) -> None:
    finish(config, "experts/math")
    other = with_base(tmp_path / "mix.yaml", "experts.lr=1e-4")
    row = of(other, "experts/math")
    assert row.state == "refused"
    assert "holds another run: lr: 0.002 -> 0.0001" in row.detail


@pytest.fixture
def cluster(tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Return a cluster on which the experts were submitted as job 12."""
    cluster = Cluster(tmp_path / "bin", config.run_dir)
    monkeypatch.setenv("PATH", f"{cluster.home}:/usr/bin:/bin")
    folder = RunDir(config.run_dir).log("any").parent
    entries = {
        f"experts/{name}": {"task": f"12_{place}", "log": f"{folder}/slurm-experts-12_{place}.log"}
        for place, name in enumerate(config.domains)
    }
    publish_json(config.run_dir / "slurm" / "jobs.json", entries)
    folder.mkdir()
    return cluster


def test_the_queue_is_asked_about_what_was_submitted(config: Config, cluster: Cluster) -> None:
    begin(config, "experts/math", 3)
    cluster.queue({"12_0": "RUNNING", "12_1": "PENDING|Resources", "12_2": "CANCELLED"})
    math, code, web = (of(config, f"experts/{name}") for name in config.domains)
    assert (math.state, math.detail, math.job) == ("running", "step 3 of 11 RUNNING", "12_0")
    assert (code.state, code.detail) == ("waiting", "PENDING (Resources)")
    assert (web.state, web.detail) == ("waiting", "CANCELLED, never started: submit it again")


def test_a_failed_job_is_told_with_its_state_log_and_last_line(
    config: Config, cluster: Cluster
) -> None:
    begin(config, "experts/math", 3)
    log = RunDir(config.run_dir).log("slurm-experts-12_0")
    log.write_text("much\nslurmstepd: error: killed by the time limit\n\n")
    cluster.queue({"12_0": "TIMEOUT"})
    row = of(config, "experts/math")
    assert (row.state, row.log) == ("failed", str(log))
    assert row.detail == (
        f"step 3 of 11 TIMEOUT: slurmstepd: error: killed by the time limit ({log})"
    )
    log.with_suffix(".error").write_text("what a rank left\n")
    cluster.queue({})
    assert of(config, "experts/math").detail == (
        f"step 3 of 11 gone from the queue: what a rank left ({log})"
    )


def test_an_older_end_is_known_from_the_accounts(config: Config, cluster: Cluster) -> None:
    (cluster.home / "sacct").write_text("#!/bin/bash\necho '12_0|CANCELLED by 1000'\n")
    (cluster.home / "sacct").chmod(0o755)
    RunDir(config.run_dir).log("slurm-experts-12_0").write_text("last words\n")
    row = of(config, "experts/math")
    assert (row.state, row.detail.split(":")[0]) == ("failed", "CANCELLED")


def test_references_of_a_cluster_follow_their_tasks_and_the_comparison_waits(
    config: Config, cluster: Cluster
) -> None:
    finish(config, *(f"experts/{name}" for name in config.domains))
    finish_search(config)
    folder = RunDir(config.run_dir).log("any").parent
    pieces = [*(f"references/{name}" for name in config.references), "validation"]
    tasks = dict(zip(pieces, ("15_0", "15_1", "15_2", "16"), strict=True))
    entries = {
        piece: {"task": task, "log": f"{folder}/slurm-{piece.split('/')[0]}-{task}.log"}
        for piece, task in tasks.items()
    }
    publish_json(config.run_dir / "slurm" / "jobs.json", entries)
    finish_reference(config, "learned", losses(1, 2, 3))
    score_proxy(config, "learned", losses(1, 2, 3))
    finish_reference(config, "proportional", losses(1, 2, 3))
    begin(config, "references/uniform", 3)
    cluster.queue({"15_1": "RUNNING", "15_2": "RUNNING", "16": "PENDING|Dependency"})
    with RunDir(config.run_dir).lock("references/uniform"):
        learned, uniform, proportional, validation = (of(config, piece) for piece in pieces)
    assert learned == Status("references/learned", "done", "", "15_0")
    assert uniform.state == "running"
    assert uniform.detail.startswith("step 3 of 11 (process ")
    assert proportional.detail == "trained, scored, its merge is not RUNNING"
    assert (validation.state, validation.detail) == (
        "waiting",
        "2 of 3 reference models trained and scored PENDING (Dependency)",
    )
    (RunDir(config.run_dir).reference("proportional") / "scores.json").unlink()
    assert of(config, "references/proportional").detail == "trained, not scored RUNNING"


def test_a_comparison_of_other_references_is_not_done(config: Config) -> None:
    finish(config, *(f"experts/{name}" for name in config.domains))
    finish_search(config)
    finish_references(config, dict.fromkeys(config.references, losses(1, 2, 3)))
    assert of(config, "validation").state == "stopped"
    rows = [{"name": name} for name in config.references]
    publish_json(RunDir(config.run_dir).validation, rows)  # as an older version wrote it
    assert of(config, "validation").state == "stopped"
    mine = {"digests": search_digests(config)}
    other = {"digests": {**search_digests(config), "utility": "of another search"}}
    for record in (mine | {"references": rows[:2]}, other | {"references": rows}):
        publish_json(RunDir(config.run_dir).validation, record)
        assert of(config, "validation").state == "stopped"
    publish_json(RunDir(config.run_dir).validation, mine | {"references": rows})
    assert of(config, "validation").state == "done"


@pytest.mark.parametrize(
    ("search", "trials"),
    [
        ("{trials: 24}", 24),
        ("{strategy: fixed, points: [{math: 0.5, code: 0.5}, {web: 1}]}", 3 + 2 + 2),
        ("{strategy: gradient, steps: 10}", 3 + 3 + 10),
    ],
)
def test_a_search_that_was_begun_is_told_with_the_trials_of_its_strategy(
    tmp_path: Path, search: str, trials: int
) -> None:
    config = with_base(write_config(tmp_path), f"search={search}")
    finish(config, *(f"experts/{name}" for name in config.domains))
    journal = RunDir(config.run_dir).trials
    journal.parent.mkdir(parents=True, exist_ok=True)
    journal.write_text("{}\n" * 5)
    assert of(config, "search").detail.startswith(f"4 trials of {trials} and the candidates; ")


def test_for_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path)
    status(path, [], as_json=True)
    rows = json.loads(capsys.readouterr().out)
    assert rows[0] == {
        "piece": "base",
        "state": "waiting",
        "detail": "not started",
        "job": None,
        "log": None,
    }
    status(path, [])
    assert "not started" in capsys.readouterr().out
    assert load_config(path).base.train is not None
