"""The user's launch of Megatron-LM, made into what SLURM starts on every node of a job.

A launch with torchrun is started once per node; its rendezvous words give way to those of the job.
A launch of Python alone is started once per GPU and learns its rank from SLURM. Anything else, such
as a script, hides how many ranks it starts, and is refused.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mergemix.config import Config, Slurm
from megatron_mergemix.errors import ConfigError

RENDEZVOUS = (
    "--rdzv-backend=c10d",
    '--rdzv-id="$SLURM_JOB_ID"',
    '--rdzv-endpoint="$head:$port"',
)
"""Words of shell: where the nodes of a job find each other, by variables that every job sets."""

SWITCHES = {
    *("--standalone", "-m", "--module", "--no-python", "--run-path", "--virtual-local-rank"),
    *("--use-env", "-h", "--help"),
}
"""Options of torchrun without a value; after any other comes one."""

_REPLACED = {
    *("--standalone", "--nnodes", "--node-rank", "--master-addr", "--master-port"),
    *("--rdzv-backend", "--rdzv-id", "--rdzv-endpoint"),
}
_TORCHRUN_MODULES = ("torch.distributed.run", "torch.distributed.launch")
_PYTHON = re.compile(r"python[0-9.]*")
_STARTERS = ("srun", "sbatch", "salloc", "mpirun", "mpiexec", "pdsh", "ssh")

_RANK_FROM_SLURM = 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$@"'


@dataclass(frozen=True)
class LaunchLine:
    """A launch as a job starts it.

    Attributes:
        words: words of shell, quoted where they need it.
        tasks_per_node: how often SLURM starts them on a node.
        exports: lines of shell before it.
    """

    words: tuple[str, ...]
    tasks_per_node: int
    exports: tuple[str, ...] = ()


def launch_line(config: Config) -> LaunchLine:
    """Return the launch of an experiment as its jobs start it.

    Raises:
        ConfigError: ``launch.command`` is missing, cannot be started on the nodes of a job, or does
            not fit the ``slurm`` section.
    """
    words, slurm = config.launch.command, config.slurm
    assert slurm is not None, "checked before any script is written"
    if words is None:
        raise ConfigError(
            "launch.command is missing: the words of your launch of pretrain_gpt.py, which the "
            "jobs of mergemix submit run."
        )
    names = [Path(word).name for word in words]
    if names[0] in _STARTERS:
        raise ConfigError(
            f"launch.command starts with {words[0]}, but the jobs of mergemix submit have an srun "
            "of their own. Give what it starts: torchrun ..., or python ...; options of srun go "
            "into slurm.srun."
        )
    _check_plugin(words)
    start = _after_torchrun(words)
    if start is not None:
        return _by_torchrun(words, start, slurm)
    if any(_PYTHON.fullmatch(name) for name in names):
        return _by_python(words, slurm)
    raise ConfigError(
        f"launch.command ({shlex.join(words[:3])} ...) has neither torchrun nor python among its "
        "words, so nobody can see how many ranks it starts on a node. Write the words that the "
        "script runs in its place; slurm.setup takes lines that prepare the node."
    )


def _check_plugin(words: Sequence[str]) -> None:
    """Check that the stages are known to the script, where its tree can be seen from here.

    Raises:
        ConfigError: it is an unpatched Megatron-LM, started without the launcher.
    """
    if "megatron_mergemix.launch" in words:
        return
    for word in words:
        arguments = Path(word).parent / "megatron" / "training" / "arguments.py"
        if word.endswith(".py") and arguments.is_file():
            if "megatron_mergemix" in arguments.read_text(encoding="utf-8"):
                return
            raise ConfigError(
                f"launch.command starts {word}, which does not know --mergemix-config. Put "
                f"-m megatron_mergemix.launch before it, or patch {Path(word).parent} (patches/)."
            )


def _after_torchrun(words: Sequence[str]) -> int | None:
    """Return the place of torchrun's first own word, or None where there is no torchrun."""
    for place, word in enumerate(words):
        if Path(word).name == "torchrun":
            return place + 1
        if word == "-m" and "".join(words[place + 1 : place + 2]) in _TORCHRUN_MODULES:
            return place + 2
    return None


def _by_torchrun(words: Sequence[str], start: int, slurm: Slurm) -> LaunchLine:
    kept: list[str] = []
    ranks = "1"
    rest = list(words[start:])
    while rest and rest[0].startswith("-"):
        option, value, length = _option(rest)
        if option == "--nnodes" and value != str(slurm.nodes):
            raise ConfigError(
                f"launch.command has --nnodes {value}, but slurm.nodes is {slurm.nodes}. Leave "
                "--nnodes away: the jobs have that of slurm.nodes."
            )
        if option == "--nproc-per-node":
            ranks = value
        if option not in _REPLACED:
            kept += rest[:length]
        rest = rest[length:]
    if slurm.gpus_per_node is not None and ranks.isdecimal() and int(ranks) != slurm.gpus_per_node:
        raise ConfigError(
            f"launch.command starts {ranks} ranks per node (--nproc-per-node), expected one for "
            f"each GPU: slurm.gpus_per_node is {slurm.gpus_per_node}."
        )
    ours = [f"--nnodes={slurm.nodes}", *RENDEZVOUS]
    return LaunchLine((*_quoted(words[:start]), *ours, *_quoted(kept), *_quoted(rest)), 1)


def _option(words: Sequence[str]) -> tuple[str, str, int]:
    """Return the option that words begin with, by its name with dashes; its value, and its words.

    Values may be words of their own, or follow ``=`` or a single letter at once.
    """
    name, equals, value = words[0].partition("=")
    if not name.startswith("--"):
        name, value, equals = name[:2], words[0][2:], words[0][2:]
    name = name.replace("_", "-")
    if equals or name in SWITCHES:
        return name, value, 1
    return name, "".join(words[1:2]), 2


def _by_python(words: Sequence[str], slurm: Slurm) -> LaunchLine:
    ranks = slurm.gpus_per_node
    if ranks is None:
        raise ConfigError(
            "slurm.gpus_per_node is missing: launch.command has no torchrun, so the jobs start it "
            "once for each GPU of a node."
        )
    if slurm.cpus_per_node is not None and slurm.cpus_per_node < ranks:
        raise ConfigError(
            f"slurm.cpus_per_node is {slurm.cpus_per_node}, expected at least {ranks}, one for "
            "each rank that the jobs start on a node (slurm.gpus_per_node)."
        )
    exports = (
        f'export MASTER_ADDR="$head" MASTER_PORT="$port" WORLD_SIZE={slurm.nodes * ranks}',
        f"export LOCAL_WORLD_SIZE={ranks}",
    )
    shell = ("bash", "-c", shlex.quote(_RANK_FROM_SLURM), "rank")
    return LaunchLine((*shell, *_quoted(words)), ranks, exports)


def _quoted(words: Sequence[str]) -> list[str]:
    return [shlex.quote(word) for word in words]
