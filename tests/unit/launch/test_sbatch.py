"""The text of the jobs, and what bash makes of it."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from megatron_mergemix.config import Config, load_config
from megatron_mergemix.launch.sbatch import Place, script
from megatron_mergemix.run_dir import RunDir
from tests.support.untrained import write_config

EXAMPLES = Path(__file__).parents[3] / "examples" / "slurm"
EXAMPLE_PLACE = Path("/lustre/me")

# Stands for srun and scontrol: notes what it was called with, and does what a test asks for.
STUB = """#!/bin/bash
echo "$(basename "$0") $*" >> "$CALLS"
[ "$(basename "$0") $1 $2" = "scontrol show hostnames" ] && printf 'node1\\nnode2\\n'
if [ "$(basename "$0")" = srun ]; then eval "$SRUN_DOES"; fi
"""


def settings(tmp_path: Path, **changes: object) -> Config:
    slurm = {"cpus_per_node": 2, **changes}
    return load_config(write_config(tmp_path, {"slurm": slurm}))


@pytest.mark.parametrize("job", ["experts", "search", "blend", "references", "validation"])
def test_the_examples_are_what_is_written_today(job: str) -> None:
    config = load_config(EXAMPLES / "mix.yaml")
    left = [*config.domains, *config.references]
    text = script(config, job, Place(EXAMPLE_PLACE, "python"), left)
    assert (EXAMPLES / f"{job}.sbatch").read_text() == text


def test_every_example_can_be_parsed_by_bash() -> None:
    paths = sorted(EXAMPLES.glob("*.sbatch"))
    assert len(paths) == 6
    for path in paths:
        subprocess.run(["bash", "-n", str(path)], check=True)


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if "#SBATCH" in line]


def test_only_the_experts_that_are_left_are_in_the_array(tmp_path: Path) -> None:
    config, place = settings(tmp_path), Place(tmp_path)
    assert "--array=0-2" in directives(script(config, "experts", place, ["math", "code", "web"]))
    text = script(config, "experts", place, ["web", "math"])
    assert "--array=0,2" in directives(text)
    assert "experts=(math code web)" in text.splitlines()
    some = settings(tmp_path, experts_at_once=1)
    assert "--array=1%1" in directives(script(some, "experts", place, ["code"]))


COMPONENTS = {
    "algebra": {"math": 0.8, "web": 0.2},
    "code": {"code": 1.0},
    "web": {"web": 1.0},
    "all": "proportional",
}


def test_the_array_trains_the_experts_by_their_own_names(tmp_path: Path) -> None:
    experts = {"tokens": 330, "lr": 2e-3, "components": COMPONENTS}
    path = write_config(tmp_path, {"slurm": {}, "experts": experts})
    config, place = load_config(path), Place(tmp_path, "python")
    text = script(config, "experts", place, ["algebra", "code", "web", "all"])
    assert "--array=0-3" in directives(text)
    assert "experts=(algebra code web all)" in text.splitlines()
    assert "--array=0,3" in directives(script(config, "experts", place, ["all", "algebra"]))
    RunDir(config.run_dir).log("any").parent.mkdir(parents=True)
    done = run(tmp_path, text.replace("code web all)", "all web code)"))  # task 1 is all
    assert done.returncode == 0, done.stderr
    assert " experts/all --error-file=" in calls(tmp_path)[-1]


def test_resources_are_those_of_the_settings(tmp_path: Path) -> None:
    config = settings(
        tmp_path,
        gpus_per_node=1,
        cpus_per_node=None,
        account="me",
        qos="high",
        options={"constraint": "h100|h200", "mem": "10G", "requeue": False, "contiguous": True}
        | {"comment": "two words"},
    )
    found = directives(script(config, "search", Place(tmp_path)))
    assert "--gpus-per-node=1" in found
    assert "--exclusive" in found
    assert "--mem=10G" in found
    assert "--constraint='h100|h200'" in found
    assert "--comment='two words'" in found
    assert "--contiguous" in found
    assert "--requeue" not in found
    blend = directives(script(config, "blend", Place(tmp_path)))
    assert "--nodes=1" in blend
    assert not any("gpus" in line or "exclusive" in line for line in blend)


def test_a_percent_sign_in_a_path_is_no_pattern_of_slurm(tmp_path: Path) -> None:
    config = load_config(
        write_config(tmp_path, {"slurm": {}, "run_dir": str(tmp_path / "100%j of it")})
    )
    [output] = [line for line in directives(script(config, "search", Place())) if "output" in line]
    assert output.endswith("/100%%j of it/logs/slurm-search-%j.log'")


# ---- in bash, with srun and scontrol replaced ----


def run(tmp_path: Path, text: str, does: str = "exit 0") -> subprocess.CompletedProcess[str]:
    array = {"SLURM_ARRAY_JOB_ID": "20015", "SLURM_ARRAY_TASK_ID": "1"}
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("srun", "scontrol"):
        (tools / name).write_text(STUB)
        (tools / name).chmod(0o755)
    return subprocess.run(
        ["bash", "-c", text],
        env=os.environ
        | {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "CALLS": str(tmp_path / "calls"),
            "SRUN_DOES": does,
            "SLURM_JOB_ID": "20017",
            "SLURM_JOB_NODELIST": "node[1-2]",
        }
        | (array if "#SBATCH --array" in text else {}),
        capture_output=True,
        text=True,
        timeout=60,
    )


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "calls").read_text().splitlines()


def with_blanks(tmp_path: Path) -> Config:
    path = write_config(tmp_path, {"slurm": {}, "run_dir": str(tmp_path / "a $HOME 'b'")})
    config = load_config(path)
    RunDir(config.run_dir).log("any").parent.mkdir(parents=True)
    return config


def test_an_array_task_trains_its_expert_with_a_port_of_its_own(tmp_path: Path) -> None:
    config = with_blanks(tmp_path)
    done = run(tmp_path, script(config, "experts", Place(tmp_path, "python"), ["code"]))
    assert done.returncode == 0, done.stderr
    [_, started] = calls(tmp_path)
    home = config.run_dir
    assert started == (
        "srun --kill-on-bad-exit=1 python -m torch.distributed.run --nnodes=1 --nproc-per-node=1 "
        "--rdzv-backend=c10d --rdzv-id=20017 --rdzv-endpoint=node1:10017 "
        f"-m megatron_mergemix.jobs.worker train {home}/slurm/config.json experts/code "
        f"--error-file={home}/logs/slurm-experts-20015_1.error"
    )


def test_a_failure_is_the_exit_code_and_the_last_words_of_the_job(tmp_path: Path) -> None:
    config = with_blanks(tmp_path)
    error = RunDir(config.run_dir).log("slurm-search-20017").with_suffix(".error")
    error.write_text("of an earlier start")
    done = run(tmp_path, script(config, "search", Place(tmp_path)), "exit 3")
    assert done.returncode == 3
    assert "error: it ended with exit code 3\n" in done.stderr
    assert "submit it again" in done.stderr
    assert error.read_text() == "it ended with exit code 3\n"


@pytest.mark.parametrize(
    "line",
    [
        "pretrain_gpt.py: error: unrecognized arguments: --bf17",
        "[rank3]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        "AssertionError: no save",
        "slurmstepd: error: execve(): torchrun: No such file or directory",
    ],
)
def test_an_error_in_the_log_is_what_it_ended_with(tmp_path: Path, line: str) -> None:
    config = with_blanks(tmp_path)
    log = RunDir(config.run_dir).log("slurm-search-20017")
    log.write_text("ValueError: of an earlier run of this job\n")
    words = [
        "Traceback (most recent call last):",
        "srun: error: node1: task 0: Exited with exit code 1",
        line,
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ",
        "RuntimeError: a consequence",
    ]
    does = f"printf '%s\\n' {shlex.join(words)} >> {shlex.quote(str(log))}; exit 1"
    done = run(tmp_path, script(config, "search", Place(tmp_path)), does)
    assert done.returncode == 1
    assert f"error: it ended with exit code 1: {line}\n" in done.stderr


def test_what_a_rank_left_is_told(tmp_path: Path) -> None:
    config = with_blanks(tmp_path)
    error = RunDir(config.run_dir).log("slurm-base-20017").with_suffix(".error")
    does = f"echo the loss is nan > {shlex.quote(str(error))}; exit 1"
    done = run(tmp_path, script(config, "base", Place(tmp_path)), does)
    assert done.returncode == 1
    assert "error: the loss is nan\n" in done.stderr


@pytest.mark.parametrize("saved", [True, False])
def test_a_job_at_its_time_limit_is_queued_again_if_it_has_saved(
    tmp_path: Path, saved: bool
) -> None:
    config = with_blanks(tmp_path)
    base = RunDir(config.run_dir).base
    base.mkdir()
    name = "latest_checkpointed_iteration.txt" if saved else "half-a-save"
    # $PPID of the step is the job's shell, which SLURM signals two minutes before the end.
    does = f"sleep 1; touch {shlex.quote(str(base / name))}; kill -USR1 $PPID; sleep 1; exit 7"
    done = run(tmp_path, script(config, "base", Place(tmp_path)), does)
    assert done.returncode == 7
    assert ("scontrol requeue 20017" in calls(tmp_path)) == saved
    assert ("raise slurm.time.base" in done.stderr) != saved


@pytest.mark.parametrize("trials", [0, 1])
def test_a_search_at_its_time_limit_is_queued_again_if_it_has_trials(
    tmp_path: Path, trials: int
) -> None:
    config = with_blanks(tmp_path)
    journal = RunDir(config.run_dir).trials
    journal.parent.mkdir(parents=True)
    lines = "header\\n" + "trial\\n" * trials
    writes = f"printf {shlex.quote(lines)} > {shlex.quote(str(journal))}"
    does = f"sleep 1; {writes}; kill -USR1 $PPID; sleep 1; exit 7"
    done = run(tmp_path, script(config, "search", Place(tmp_path)), does)
    assert ("scontrol requeue 20017" in calls(tmp_path)) == bool(trials)
    assert ("raise slurm.time.search" in done.stderr) != bool(trials)


def test_every_job_can_be_parsed_by_bash(tmp_path: Path) -> None:
    config = with_blanks(tmp_path)
    for job in ("base", "experts", "search", "blend", "references", "validation"):
        text = script(config, job, Place(tmp_path), ["math"])
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_only_the_references_that_are_left_are_in_the_array(tmp_path: Path) -> None:
    config, place = settings(tmp_path, references_at_once=4), Place(tmp_path)
    text = script(config, "references", place, ["learned", "uniform", "proportional"])
    assert "--array=0-2%4" in directives(text)
    assert "references=(learned uniform proportional)" in text.splitlines()
    assert "--array=0,2%4" in directives(
        script(config, "references", place, ["proportional", "learned"])
    )
    assert "--time=24:00:00" in directives(text)


def test_an_array_task_trains_and_scores_its_reference(tmp_path: Path) -> None:
    config = with_blanks(tmp_path)
    done = run(tmp_path, script(config, "references", Place(tmp_path, "python"), ["uniform"]))
    assert done.returncode == 0, done.stderr
    [_, started] = calls(tmp_path)
    home = config.run_dir
    assert started.endswith(
        f"-m megatron_mergemix.jobs.worker validate {home}/slurm/config.json uniform "
        f"--error-file={home}/logs/slurm-references-20015_1.error"
    )


@pytest.mark.parametrize("saved", [True, False])
def test_a_reference_at_its_time_limit_is_queued_again_if_it_has_saved(
    tmp_path: Path, saved: bool
) -> None:
    config = with_blanks(tmp_path)
    own, other = (RunDir(config.run_dir).reference(name) for name in ("uniform", "learned"))
    for folder in (own, other):
        folder.mkdir(parents=True)
    place = shlex.quote(str((own if saved else other) / "latest_checkpointed_iteration.txt"))
    does = f"sleep 1; touch {place}; kill -USR1 $PPID; sleep 1; exit 7"
    done = run(tmp_path, script(config, "references", Place(tmp_path), ["uniform"]), does)
    assert done.returncode == 7
    assert ("scontrol requeue 20015_1" in calls(tmp_path)) == saved
    assert ("raise slurm.time.reference, or lower" in done.stderr) != saved


def test_the_validation_is_the_comparison_alone(tmp_path: Path) -> None:
    config = with_blanks(tmp_path)
    text = script(config, "validation", Place(tmp_path, "python"))
    assert {"--nodes=1", "--time=00:30:00"} < set(directives(text))
    done = run(tmp_path, text)
    assert done.returncode == 0, done.stderr
    [verb] = calls(tmp_path)
    assert verb.endswith(f"python -m megatron_mergemix validate {config.run_dir}/slurm/config.json")
