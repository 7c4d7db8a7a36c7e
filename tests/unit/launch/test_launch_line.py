"""What SLURM starts on a node for a launch of the user's, and which launches it cannot start."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import run as torchrun

from megatron_mergemix.config import Config
from megatron_mergemix.errors import ConfigError
from megatron_mergemix.launch.launch_line import SWITCHES, launch_line
from tests.unit.megatron_lm.test_mixture_flag import config as any_config

OURS = '--nnodes=2 --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$head:$port"'
REST = "-m megatron_mergemix.launch pretrain_gpt.py --bf16"


def config(command: str | None, **slurm: Any) -> Config:
    settings = any_config().model_dump()
    settings["launch"]["command"] = command
    settings["slurm"] = {"nodes": 2, "gpus_per_node": 8, **slurm}
    return Config.model_validate(settings)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (f"torchrun --nproc-per-node 8 {REST}", f"torchrun {OURS} --nproc-per-node 8 {REST}"),
        (f"torchrun --nproc_per_node=8 {REST}", f"torchrun {OURS} --nproc_per_node=8 {REST}"),
        (
            f"/opt/bin/torchrun --standalone --nproc-per-node gpu {REST}",
            f"/opt/bin/torchrun {OURS} --nproc-per-node gpu {REST}",
        ),
        (
            "torchrun --nnodes 2 --node_rank 0 --master_addr host --master_port=6000 "
            f"--max-restarts 0 --nproc-per-node 8 -r3 -t 3 {REST}",
            f"torchrun {OURS} --max-restarts 0 --nproc-per-node 8 -r3 -t 3 {REST}",
        ),
        (
            "torchrun --rdzv-backend c10d --rdzv-id=7 --rdzv_endpoint host:1 "
            f"--rdzv-conf timeout=900 --nproc-per-node 8 {REST}",
            f"torchrun {OURS} --rdzv-conf timeout=900 --nproc-per-node 8 {REST}",
        ),
        (
            f"apptainer exec --nv megatron.sif python -m torch.distributed.run --nproc-per-node 8 "
            f"{REST}",
            f"apptainer exec --nv megatron.sif python -m torch.distributed.run {OURS} "
            f"--nproc-per-node 8 {REST}",
        ),
        (
            "torchrun --nproc-per-node 8 --no-python nsys profile python x.py --nnodes 5",
            f"torchrun {OURS} --nproc-per-node 8 --no-python nsys profile python x.py --nnodes 5",
        ),
        (
            "torchrun --nproc-per-node 8 x.py --wandb-exp-name 'my run'",
            f"torchrun {OURS} --nproc-per-node 8 x.py --wandb-exp-name 'my run'",
        ),
    ],
)
def test_torchrun_is_started_once_per_node_with_the_job_s_rendezvous(
    given: str, expected: str
) -> None:
    line = launch_line(config(given))
    assert " ".join(line.words) == expected
    assert line.tasks_per_node == 1
    assert line.exports == ()


def test_the_options_without_a_value_are_those_of_torchrun() -> None:
    actions = torchrun.get_args_parser()._actions
    switches = {name for each in actions if each.nargs == 0 for name in each.option_strings}
    assert {name.replace("_", "-") for name in switches} | {"--use-env"} == SWITCHES


def test_torchrun_understands_what_is_written() -> None:
    line = launch_line(config(f"torchrun --nproc-per-node 8 --standalone -t 3 {REST}"))
    words = shlex.split(" ".join(line.words[1:]))
    read = torchrun.get_args_parser().parse_args(words)
    assert (read.nnodes, read.nproc_per_node, read.tee, read.module) == ("2", "8", "3", True)
    assert (read.rdzv_backend, read.rdzv_endpoint) == ("c10d", "$head:$port")
    assert not read.standalone
    assert read.training_script == "megatron_mergemix.launch"
    assert read.training_script_args == ["pretrain_gpt.py", "--bf16"]


def test_python_alone_is_started_once_per_gpu_with_ranks_from_slurm() -> None:
    line = launch_line(config(f"python {REST}"))
    assert line.tasks_per_node == 8
    ranks = """'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$@"'"""
    assert line.words == ("bash", "-c", ranks, "rank", "python", *REST.split())
    assert line.exports == (
        'export MASTER_ADDR="$head" MASTER_PORT="$port" WORLD_SIZE=16',
        "export LOCAL_WORLD_SIZE=8",
    )


@pytest.mark.parametrize(
    ("command", "slurm", "message"),
    [
        (None, {}, "launch.command is missing"),
        (f"srun python {REST}", {}, "starts with srun, but the jobs .* have an srun of their own"),
        (f"mpirun -np 16 python {REST}", {}, "starts with mpirun"),
        ("bash train.sh", {}, "has neither torchrun nor python among its words"),
        (f"bash -c 'torchrun {REST}'", {}, "has neither torchrun nor python"),
        (f"torchrun --nnodes 4 --nproc-per-node 8 {REST}", {}, "--nnodes 4, but slurm.nodes is 2"),
        (f"torchrun --nnodes=1:2 --nproc-per-node 8 {REST}", {}, "has --nnodes 1:2"),
        (f"torchrun --nproc-per-node 4 {REST}", {}, "starts 4 ranks per node .* is 8"),
        (f"torchrun {REST}", {}, "starts 1 ranks per node"),
        (f"python {REST}", {"gpus_per_node": None}, "slurm.gpus_per_node is missing"),
        (f"python {REST}", {"cpus_per_node": 4}, "cpus_per_node is 4, expected at least 8"),
    ],
)
def test_what_cannot_work_is_refused(
    command: str | None, slurm: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        launch_line(config(command, **slurm))


@pytest.mark.parametrize("patched", [True, False])
def test_an_unpatched_tree_needs_the_launcher(tmp_path: Path, patched: bool) -> None:
    arguments = tmp_path / "megatron" / "training" / "arguments.py"
    arguments.parent.mkdir(parents=True)
    arguments.write_text("from megatron_mergemix.megatron_lm import hooks\n" * patched)
    command = f"torchrun --nproc-per-node 8 {tmp_path}/pretrain_gpt.py --bf16"
    if patched:
        assert launch_line(config(command)).words[-1] == "--bf16"
        return
    with pytest.raises(ConfigError, match="does not know --mergemix-config. Put -m megatron_merge"):
        launch_line(config(command))
    launch_line(config(command.replace(" /", " -m megatron_mergemix.launch /")))
