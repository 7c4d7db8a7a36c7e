"""The jobs of a launch of the user's own, and what bash makes of them."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from megatron_mergemix.config import Config, load_config
from megatron_mergemix.launch.sbatch import Place, script
from megatron_mergemix.run_dir import RunDir
from tests.support.launch import COMMAND, write_launch
from tests.unit.launch.test_sbatch import calls, directives, run

LAUNCHED = (
    "srun --kill-on-bad-exit=1 torchrun --nnodes=2 --rdzv-backend=c10d --rdzv-id=20017 "
    "--rdzv-endpoint=node1:10017 --nproc-per-node 1 -m megatron_mergemix.launch pretrain_gpt.py "
    "--bf16 --mergemix-config"
)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return experiment(tmp_path)


def experiment(tmp_path: Path, command: str = COMMAND, **slurm: object) -> Config:
    config = load_config(write_launch(tmp_path, {"nodes": 2, **slurm}, command))
    run_dir = RunDir(config.run_dir)
    run_dir.log("any").parent.mkdir(parents=True, exist_ok=True)
    run_dir.expert("code").mkdir(parents=True)
    for name in config.references:
        run_dir.reference(name).mkdir(parents=True)
    return config


def finishing(folder: Path) -> str:
    """Return what a launch does that trains a run to its end."""
    return f"touch {shlex.quote(str(folder / 'finished.json'))}"


def test_an_array_task_is_the_stage_expert_of_its_domain(tmp_path: Path, config: Config) -> None:
    text = script(config, "experts", Place(tmp_path), ["code"])
    does = finishing(config.run_dir / "experts" / "code")
    done = run(tmp_path, text, f"echo $MERGEMIX_ERROR_FILE; {does}")
    assert done.returncode == 0, done.stderr
    [_, started] = calls(tmp_path)
    settings = config.run_dir / "slurm" / "config.json"
    assert started == f"{LAUNCHED} {settings} --mergemix-stage expert --mergemix-expert code"
    assert done.stdout == f"{config.run_dir}/logs/slurm-experts-20015_1.error\n"
    assert "--ntasks-per-node=1" in directives(text)
    assert "--requeue" in directives(text)
    assert "--signal=B:USR1@120" in directives(text)


def test_the_search_is_one_launch(tmp_path: Path, config: Config) -> None:
    done = run(tmp_path, script(config, "search", Place(tmp_path)))
    assert done.returncode == 0, done.stderr
    [_, started] = calls(tmp_path)
    assert started.endswith("config.json --mergemix-stage search")


def test_a_reference_is_trained_and_scored_and_so_is_the_merge_beside_it(
    tmp_path: Path, config: Config
) -> None:
    does = finishing(config.run_dir / "references" / "uniform")
    text = script(config, "references", Place(tmp_path, "python"), ["uniform"])
    done = run(tmp_path, text, does)
    assert done.returncode == 0, done.stderr
    [_, *started] = calls(tmp_path)
    assert [line.partition("--mergemix-stage ")[2] for line in started] == [
        "reference --mergemix-mixture uniform",
        "evaluate --mergemix-mixture uniform",
        "evaluate --mergemix-model mixture:uniform",
    ]


def test_the_comparison_is_a_job_of_one_process(tmp_path: Path, config: Config) -> None:
    done = run(tmp_path, script(config, "validation", Place(tmp_path, "python")))
    assert done.returncode == 0, done.stderr
    [verb] = calls(tmp_path)
    assert verb.endswith(f"python -m megatron_mergemix validate {config.run_dir}/slurm/config.json")


def test_a_failed_reference_is_the_end_of_the_job(tmp_path: Path, config: Config) -> None:
    does = f"echo it diverged > {config.run_dir}/logs/slurm-references-20015_1.error; exit 1"
    done = run(tmp_path, script(config, "references", Place(tmp_path), ["uniform"]), does)
    assert done.returncode == 1
    assert len(calls(tmp_path)) == 2
    assert "error: it diverged\n" in done.stderr


@pytest.mark.parametrize(
    ("name", "saved"),
    [
        ("checkpoints/latest_checkpointed_iteration.txt", True),
        ("checkpoints/half-a-save", False),
        ("start/latest_checkpointed_iteration.txt", False),  # of what it has loaded
    ],
)
def test_a_launch_that_left_before_its_run_was_done_goes_on_if_it_has_saved(
    tmp_path: Path, config: Config, name: str, saved: bool
) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "sleep").write_text("#!/bin/bash\n")  # SLURM would end it meanwhile
    (tmp_path / "tools" / "sleep").chmod(0o755)
    folder = config.run_dir / "experts" / "code"
    (folder / name).parent.mkdir(parents=True)
    does = f"read -t 1 < <(tail -f /dev/null); touch {shlex.quote(str(folder / name))}"
    done = run(tmp_path, script(config, "experts", Place(tmp_path), ["code"]), does)
    assert done.returncode == 1
    # By number alone, the last task of an array would queue all of them again.
    assert ("scontrol requeue 20015_1" in calls(tmp_path)) == saved
    assert ("or lower --save-interval" in done.stderr) != saved


def test_python_alone_gets_its_rank_from_slurm(tmp_path: Path) -> None:
    config = experiment(
        tmp_path, "python -m megatron_mergemix.launch x.py", gpus_per_node=8, cpus_per_node=96
    )
    text = script(config, "search", Place(tmp_path))
    assert {"--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12"} < set(
        directives(text)
    )
    fake = tmp_path / "tools" / "python"
    fake.parent.mkdir()
    fake.write_text('#!/bin/bash\necho "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT"\n')
    fake.chmod(0o755)
    does = 'shift 2; SLURM_PROCID=11 SLURM_LOCALID=3 "$@"'
    done = run(tmp_path, text, does)
    assert done.stdout == "11 3 16 node1 10017\n", done.stderr


@pytest.mark.parametrize("command", [COMMAND, "python -m megatron_mergemix.launch x.py 'a b'"])
def test_every_job_can_be_parsed_by_bash(tmp_path: Path, command: str) -> None:
    config = experiment(tmp_path, command, gpus_per_node=1)
    for job in ("experts", "search", "blend", "references", "validation"):
        text = script(config, job, Place(tmp_path), ["math", "uniform"])
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
