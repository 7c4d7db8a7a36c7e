"""What is queued, behind what, and what is left alone; SLURM's commands are small scripts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_mergemix.config import Config, load_config
from megatron_mergemix.errors import ConfigError, MergeMixError
from megatron_mergemix.launch import verbs
from megatron_mergemix.launch.status import statuses
from megatron_mergemix.launch.submit import submit
from megatron_mergemix.training_runs.experiment_runs import requested_run
from tests.support.finished import finish_reference, finish_search, losses, score_proxy
from tests.support.torch_dist import write_checkpoint
from tests.support.untrained import write_config

# Numbers from 11 on; notes the call; the queue is a file that a test writes.
SBATCH = """#!/bin/bash
number=$(($(cat {home}/number) + 1))
echo $number > {home}/number
echo "sbatch $*" | sed "s#{run_dir}/##" >> {home}/calls
echo "$number;cluster"
"""
SQUEUE = "#!/bin/bash\ncat {home}/queue\n"
SCANCEL = '#!/bin/bash\necho "scancel $*" >> {home}/calls\n'


class Cluster:
    """SLURM's commands, replaced; what they were called with, and what the queue holds."""

    def __init__(self, home: Path, run_dir: Path) -> None:
        self.home = home
        home.mkdir()
        for name, text in {"sbatch": SBATCH, "squeue": SQUEUE, "scancel": SCANCEL}.items():
            (home / name).write_text(text.format(home=home, run_dir=run_dir))
            (home / name).chmod(0o755)
        (home / "number").write_text("10")
        self.queue({})

    def queue(self, states: dict[str, str]) -> None:
        """Set what squeue says: task -> state, or state and reason."""
        lines = [f"{task}|{state}" + "|None" * ("|" not in state) for task, state in states.items()]
        (self.home / "queue").write_text("\n".join(lines) + "\n")

    def calls(self) -> list[str]:
        """Return the calls since the last time."""
        path = self.home / "calls"
        found = path.read_text().splitlines() if path.exists() else []
        path.write_text("")
        return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_config(tmp_path, {"slurm": {}})


@pytest.fixture
def config(path: Path) -> Config:
    return load_config(path)


@pytest.fixture
def cluster(tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster(tmp_path / "bin", config.run_dir)
    monkeypatch.setenv("PATH", f"{cluster.home}:/usr/bin:/bin")
    return cluster


PENDING = "PENDING|Dependency"
AFTER = "--kill-on-invalid-dep=yes slurm"


def finish(config: Config, *names: str) -> None:
    for value, name in enumerate(names):
        run = requested_run(config, name)
        run.mark_started()
        weights = {"embedding.word_embeddings.weight": torch.full((264, 8), float(value))}
        write_checkpoint(run.checkpoints / "iter_0000010", weights)
        run.mark_finished({"checkpoint": "checkpoints/iter_0000010"})


def test_everything_is_queued_in_its_order(path: Path, config: Config, cluster: Cluster) -> None:
    submit(path, [], validate=True)
    assert cluster.calls() == [
        "sbatch --parsable slurm/base.sbatch",
        f"sbatch --parsable --dependency=afterok:11 {AFTER}/experts.sbatch",
        f"sbatch --parsable --dependency=afterok:11:12 {AFTER}/search.sbatch",
        f"sbatch --parsable --dependency=afterok:13 {AFTER}/blend.sbatch",
        f"sbatch --parsable --dependency=afterok:13 {AFTER}/references.sbatch",
        f"sbatch --parsable --dependency=afterok:15 {AFTER}/validation.sbatch",
    ]
    record = json.loads((config.run_dir / "slurm" / "jobs.json").read_text())
    assert record["experts/web"]["task"] == "12_2"
    assert record["experts/web"]["log"].endswith("run/logs/slurm-experts-12_2.log")
    assert record["references/proportional"]["task"] == "15_2"
    assert record["references/uniform"]["log"].endswith("run/logs/slurm-references-15_1.log")
    settings = json.loads((config.run_dir / "slurm" / "config.json").read_text())
    assert settings == config.model_dump(mode="json")
    assert load_config(config.run_dir / "slurm" / "config.json") == config


def test_a_failed_reference_alone_is_queued_again_and_the_comparison_behind_all(
    path: Path, config: Config, cluster: Cluster
) -> None:
    finish(config, "base", "experts/math", "experts/code", "experts/web")
    finish_search(config)
    verbs.blend(path, [])
    submit(path, [], validate=True)
    assert cluster.calls() == [
        "sbatch --parsable slurm/references.sbatch",
        f"sbatch --parsable --dependency=afterok:11 {AFTER}/validation.sbatch",
    ]
    finish_reference(config, "learned", losses(1, 2, 3))
    score_proxy(config, "learned", losses(1, 2, 3))
    cluster.queue({"11_1": "FAILED", "11_2": "RUNNING", "12": PENDING})
    submit(path, [], validate=True)
    assert cluster.calls() == [
        "sbatch --parsable slurm/references.sbatch",
        "scancel 12",
        f"sbatch --parsable --dependency=afterok:13:11_2 {AFTER}/validation.sbatch",
    ]
    assert "#SBATCH --array=1\n" in (config.run_dir / "slurm" / "references.sbatch").read_text()


def test_what_references_will_not_tell_is_said_before_they_are_queued(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, validate, is_said in (
        ([], True, True),
        ([], False, False),
        (["validation.space_filling=1"], True, False),
    ):
        submit(path, words, validate=validate, dry_run=True)
        assert ("# note: 3 references tell" in capsys.readouterr().out) == is_said


def test_space_filling_references_are_queued_by_their_names(
    path: Path, tmp_path: Path, cluster: Cluster
) -> None:
    submit(path, ["validation.space_filling=2"], validate=True)
    text = (tmp_path / "run" / "slurm" / "references.sbatch").read_text()
    assert "references=(learned uniform proportional filling-01 filling-02)\n" in text
    assert "#SBATCH --array=0-4\n" in text
    recorded = load_config(tmp_path / "run" / "slurm" / "config.json")
    assert recorded == load_config(path, ["validation.space_filling=2"])


def test_experts_of_ones_own_are_queued_by_their_names(
    path: Path, config: Config, cluster: Cluster
) -> None:
    rows = "{algebra: {math: 0.8, web: 0.2}, code: {code: 1.0}, web: {web: 1.0}, all: uniform}"
    submit(path, [f"experts.components={rows}"])
    record = json.loads((config.run_dir / "slurm" / "jobs.json").read_text())
    tasks = {name: entry["task"] for name, entry in record.items() if name.startswith("experts/")}
    assert tasks == {
        "experts/algebra": "12_0",
        "experts/code": "12_1",
        "experts/web": "12_2",
        "experts/all": "12_3",
    }
    text = (config.run_dir / "slurm" / "experts.sbatch").read_text()
    assert "experts=(algebra code web all)" in text
    settings = (config.run_dir / "slurm" / "config.json").read_text()
    recorded = Config.model_validate_json(settings)
    assert recorded.expert_names == ["algebra", "code", "web", "all"]


def test_what_is_queued_is_not_queued_again(path: Path, cluster: Cluster) -> None:
    submit(path, [])
    cluster.calls()
    cluster.queue({"11": "RUNNING", **dict.fromkeys(("12_0", "12_1", "12_2", "13", "14"), PENDING)})
    submit(path, [])
    assert cluster.calls() == []


def test_a_failed_expert_alone_is_queued_again_and_the_search_behind_all(
    path: Path, config: Config, cluster: Cluster
) -> None:
    submit(path, [])
    cluster.calls()
    finish(config, "base", "experts/math")
    cluster.queue({"12_1": "FAILED", "12_2": "RUNNING", "13": PENDING, "14": PENDING})
    submit(path, [])
    assert cluster.calls() == [
        "sbatch --parsable slurm/experts.sbatch",
        "scancel 13",
        f"sbatch --parsable --dependency=afterok:15:12_2 {AFTER}/search.sbatch",
        "scancel 14",
        f"sbatch --parsable --dependency=afterok:16 {AFTER}/blend.sbatch",
    ]
    assert "#SBATCH --array=1\n" in (config.run_dir / "slurm" / "experts.sbatch").read_text()


def test_a_job_that_can_never_start_is_replaced(path: Path, cluster: Cluster) -> None:
    submit(path, [])
    cluster.calls()
    never = "PENDING|DependencyNeverSatisfied"
    cluster.queue({"11": "TIMEOUT", **dict.fromkeys(("12_0", "12_1", "12_2", "13", "14"), never)})
    submit(path, [])
    assert [call.split("/")[-1] for call in cluster.calls()] == [
        *("base.sbatch", "experts.sbatch", "search.sbatch", "blend.sbatch"),
    ]


def test_when_all_is_done_nothing_is_queued(
    path: Path, config: Config, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(config, "base", "experts/math", "experts/code", "experts/web")
    finish_search(config)
    submit(path, [])
    assert cluster.calls() == ["sbatch --parsable slurm/blend.sbatch"]
    verbs.blend(path, [])
    submit(path, [])
    assert cluster.calls() == []
    assert "blend: already done" in capsys.readouterr().out
    assert {row.state for row in statuses(config)} == {"done"}


def test_the_users_own_job_comes_after_the_blend_and_once(
    path: Path, tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    big = tmp_path / "big.sbatch"
    big.write_text("#!/bin/bash\n")
    submit(path, [], then=big)
    expected = f"sbatch --parsable --dependency=afterok:14 --kill-on-invalid-dep=yes {big}"
    assert cluster.calls()[-1] == expected
    cluster.queue({"11": "RUNNING", **dict.fromkeys(("12_0", "12_1", "12_2", "13", "14"), PENDING)})
    submit(path, [], then=big)
    assert cluster.calls() == []
    assert "was submitted as job 15" in capsys.readouterr().out


def test_other_settings_wait_until_the_queue_is_empty(path: Path, cluster: Cluster) -> None:
    submit(path, [])
    cluster.calls()
    cluster.queue({"11": "RUNNING"})
    with pytest.raises(MergeMixError, match=r"jobs with other settings are in the queue: 11 .*"):
        submit(path, ["search.seed=7"])
    assert cluster.calls() == []
    cluster.queue({"11": "CANCELLED"})
    submit(path, ["search.seed=7"])
    assert len(cluster.calls()) == 4


def test_the_users_own_run_reads_no_settings_of_ours(
    path: Path, tmp_path: Path, cluster: Cluster
) -> None:
    big = tmp_path / "big.sbatch"
    big.write_text("#!/bin/bash\n")
    submit(path, [], then=big)
    cluster.calls()
    ended = dict.fromkeys(("11", "12_0", "12_1", "12_2", "13", "14"), "CANCELLED")
    cluster.queue({**ended, "15": "RUNNING"})
    submit(path, ["search.seed=7"])
    assert len(cluster.calls()) == 4


def test_what_is_asked_of_the_cluster_may_change_while_jobs_run(
    path: Path, cluster: Cluster
) -> None:
    submit(path, [])
    cluster.calls()
    cluster.queue({"11": "RUNNING", "12_0": "TIMEOUT", "12_1": "RUNNING", "12_2": "RUNNING"})
    submit(path, ["slurm.time.expert=9:00:00"])
    assert cluster.calls()[0].startswith("sbatch --parsable")


def test_a_blend_of_data_that_moved_is_written_again(
    path: Path, config: Config, cluster: Cluster
) -> None:
    finish(config, "base", "experts/math", "experts/code", "experts/web")
    finish_search(config)
    verbs.blend(path, [])
    submit(path, [])
    assert cluster.calls() == []
    for prefix in config.domains["math"].prefixes:
        for suffix in (".bin", ".idx"):
            Path(f"{prefix}{suffix}").rename(f"{prefix}-moved{suffix}")
    moved = [f"{prefix}-moved" for prefix in config.domains["math"].prefixes]
    submit(path, [f"domains.math.prefixes={json.dumps(moved)}"])
    assert cluster.calls() == ["sbatch --parsable slurm/blend.sbatch"]


def test_a_dry_run_prints_and_touches_nothing(
    path: Path,
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no SLURM there
    submit(path, [], dry_run=True)
    shown = capsys.readouterr().out
    assert not config.run_dir.exists()
    folder = config.run_dir / "slurm"
    assert f"# ==> sbatch --dependency=afterok:$base {folder}/experts.sbatch\n#!/bin/bash" in shown
    assert f"# ==> sbatch --dependency=afterok:$search {folder}/blend.sbatch" in shown


def test_a_machine_without_slurm_is_one_clear_error(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MergeMixError, match="there is no sbatch on this machine.*login node"):
        submit(path, [])


def test_what_slurm_says_against_a_job_is_told(path: Path, cluster: Cluster) -> None:
    (cluster.home / "sbatch").write_text("#!/bin/bash\necho 'invalid partition' >&2; exit 1\n")
    with pytest.raises(MergeMixError, match=r"cannot submit base.sbatch: invalid partition"):
        submit(path, [])


def test_settings_without_a_cluster_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="slurm is missing"):
        submit(write_config(tmp_path), [])


def test_a_following_job_that_is_not_there_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--then names .*none.sbatch, expected an sbatch file"):
        submit(path, [], then=tmp_path / "none.sbatch")
