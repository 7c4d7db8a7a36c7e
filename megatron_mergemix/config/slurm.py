"""Rules of the jobs on a SLURM cluster that can be known before anything is submitted."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from megatron_mergemix.config.problems import Problem, shown

if TYPE_CHECKING:
    from megatron_mergemix.config import Config, Slurm

_TIME = re.compile(r"\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2}|UNLIMITED|INFINITE", re.I)
_OPTION = re.compile(r"[a-z][a-z0-9-]*")
_OURS = {
    "nodes": "slurm.nodes",
    "gpus-per-node": "slurm.gpus_per_node",
    "cpus-per-task": "slurm.cpus_per_node",
    "time": "slurm.time",
    "partition": "slurm.partition",
    "account": "slurm.account",
    "qos": "slurm.qos",
    "array": "slurm.experts_at_once and slurm.references_at_once",
}
_FIXED = (
    *("job-name", "ntasks", "ntasks-per-node", "output", "error", "open-mode", "chdir"),
    *("dependency", "signal", "kill-on-invalid-dep", "parsable", "wrap"),
)
"""What the written jobs rely on."""


def slurm_problems(config: Config) -> Iterator[Problem]:
    """Yield what keeps these settings from becoming jobs."""
    slurm = config.slurm
    if slurm is None:
        return
    if config.launch.kind == "builtin":
        yield from _ranks(slurm, config.parallel.processes)
    for kind, limit in slurm.time.model_dump().items():
        if not _TIME.fullmatch(limit):
            yield Problem(
                ("slurm", "time", kind),
                f"is {shown(limit)}, expected minutes, hours:minutes:seconds or "
                "days-hours:minutes:seconds",
            )
    yield from _options("options", slurm.options)
    yield from _options("srun", slurm.srun)
    for place, line in enumerate(slurm.setup):
        if "\n" in line:
            yield Problem(("slurm", "setup", place), "has a line break, expected one line each")


def _ranks(slurm: Slurm, processes: int) -> Iterator[Problem]:
    if slurm.gpus_per_node is not None:
        ranks = slurm.nodes * slurm.gpus_per_node
        if processes != ranks:
            yield Problem(
                ("parallel", "processes"),
                f"is {processes}, expected {ranks}, one rank for each GPU "
                f"(slurm.nodes {slurm.nodes} x slurm.gpus_per_node {slurm.gpus_per_node})",
            )
    elif processes % slurm.nodes:
        yield Problem(
            ("parallel", "processes"),
            f"is {processes}, expected a multiple of slurm.nodes {slurm.nodes}: every node starts "
            "equally many ranks",
        )


def _options(section: str, options: Mapping[str, object]) -> Iterator[Problem]:
    for name, value in options.items():
        path = ("slurm", section, name)
        if not _OPTION.fullmatch(name):
            yield Problem(path, "is no option, expected a long name without '--'")
        elif section == "options" and name in _OURS:
            yield Problem(path, f"is written by {_OURS[name]}; set that")
        elif section == "options" and name in _FIXED:
            yield Problem(path, "is set by mergemix, whose jobs rely on it")
        elif "\n" in str(value):
            yield Problem(path, "has a line break, expected one line")
