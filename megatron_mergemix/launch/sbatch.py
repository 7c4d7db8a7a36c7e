"""The text of the jobs that run an experiment on a SLURM cluster.

A job with ranks starts one task per node; torchrun starts that node's ranks and finds the other
nodes at the first one. With ``launch.kind: command`` the user's own launch takes the place of the
built-in worker; one of Python alone is a task per GPU. Blend and validation are one process. The
ranks take locks, so a job needs nobody who waits for it, and a job that runs again continues.
"""

from __future__ import annotations

import itertools
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_mergemix.config import Config, Slurm
from megatron_mergemix.launch.launch_line import RENDEZVOUS, LaunchLine, launch_line
from megatron_mergemix.processes.error_file import ERROR_FILE
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.validation.references import proxy_word

ARRAYS = {"experts": "expert", "references": "reference"}
"""Jobs with a task for each of their pieces, and what one of those is called."""

_ONE_PROCESS = {"blend": "blend", "validation": "validate"}
"""Jobs that start no ranks, and their verbs."""

_WORK = {
    "base": 'train "$config" base',
    "experts": 'train "$config" "experts/$expert"',
    "search": 'search "$config"',
    "references": 'validate "$config" "$reference"',
}
"""What the worker is asked to do, as words of shell."""

_TITLES = {
    "base": "Train the base from scratch.",
    "experts": "Train the experts, one array task each; the index is the place in `experts` below.",
    "search": "Search the mixture: base and experts resident, merged and scored in place.",
    "blend": "Write the learned mixture as Megatron blend files.",
    "references": "Train and score the reference models, one array task each; the index is the "
    "place in `references`.",
    "validation": "Compare the reference models with the merges for the same mixtures.",
}

_WIDTH = 88

_FUNCTIONS = """\
# Goes on in a new run of this job, if it has saved anything; $1 says why it cannot go on now.
started=$(date +%s) log=${error%.error}.log
begin=$(($(stat -c %s "$log" 2> /dev/null) + 1))
continue_later() {
    # Not what a start itself writes: the link to what it loads, a journal without trials.
    saved=$(find WATCHED -newermt "@$started" \\
        \\( -name latest_checkpointed_iteration.txt ! -path '*/start/latest*' \\
        -o -name trials.jsonl -exec awk 'END { exit NR < 2 }' {} \\; \\) -print -quit)
    if [ -n "$saved" ]; then
        echo "$1: queued again, to continue from the last save"
        scontrol requeue "$job"
    else
        echo "$1 and nothing was saved:" \\
            "raise ADVICE" > "$error"
    fi
}
trap 'continue_later "the time limit is near"' USR1  # two minutes before it

# Waits for the ranks that were started last; their failure is that of the job.
wait_for_ranks() {
    step=$!
    wait "$step"
    code=$?
    while kill -0 "$step" 2> /dev/null; do  # a signal ended the wait
        wait "$step"
        code=$?
    done
    [ "$code" -eq 0 ] || fail "$code"
}
fail() {
    if [ ! -s "$error" ]; then
        seen=$(tail -c "+$begin" "$log" 2> /dev/null | grep -av '^srun: ' | grep -aEm1 \\
            '^(\\[rank[0-9]+\\]: )?([A-Za-z_.]+(Error|Exception)|[^ ]+: error): [^ ]')
        echo "it ended with exit code $1${seen:+: $seen}" > "$error"
    fi
    echo "error: $(cat "$error")" >&2
    echo "What is finished is kept: mend the cause and submit it again." >&2
    exit "$1"
}
"""

_FINISHED = """\
# A launch may leave well before its run is done, as --exit-duration-in-mins makes it.
check_finished() {
    ls "$1" > /dev/null  # a network file system may know only now what another node wrote
    [ -e "$1/finished.json" ] && return
    continue_later "the launch ended before its run"
    [ -s "$error" ] || sleep 120  # SLURM ends this run of the job
    fail 1
}
"""


@dataclass(frozen=True)
class Place:
    """What jobs take from where they are submitted.

    Attributes:
        directory: working directory; relative paths of the settings are relative to it.
        python: interpreter, unless ``slurm.python`` names one.
    """

    directory: Path = field(default_factory=Path.cwd)
    python: str = sys.executable

    def run_dir(self, config: Config) -> RunDir:
        """Return the run directory by its whole path."""
        return RunDir(self.directory / config.run_dir)


def slurm_of(config: Config) -> Slurm:
    """Return the settings of the cluster, checked by whoever submits."""
    assert config.slurm is not None, "checked before any script is written"
    return config.slurm


def script_path(run_dir: RunDir, job: str) -> Path:
    """Return where the text of a job lies."""
    return run_dir.slurm / f"{job}.sbatch"


def settings_path(run_dir: RunDir) -> Path:
    """Return the settings that the jobs run with, whatever the YAML says by then."""
    return run_dir.slurm / "config.json"


def log_path(run_dir: RunDir, job: str, task: str) -> Path:
    """Return the log of a job, or of an array task such as ``"13_2"``; its error lies beside it."""
    return run_dir.log(f"slurm-{job}-{task}")


def names_of(config: Config, job: str) -> list[str]:
    """Return the names of all tasks of an array; their places are the indices."""
    return config.expert_names if job == "experts" else list(config.references)


def script(config: Config, job: str, place: Place, left: Sequence[str] = ()) -> str:
    """Return the whole text of one job.

    Args:
        config: the experiment, with its ``slurm`` section.
        job: ``base``, ``experts``, ``search``, ``blend``, ``references`` or ``validation``.
        place: working directory and interpreter.
        left: names of the experts or references that are still to be trained; only for arrays.
    """
    is_one_process = job in _ONE_PROCESS
    lines = [
        "#!/bin/bash",
        f"# {_TITLES[job]}",
        f"# Written by `mergemix submit` for {place.run_dir(config).root}.",
        *(f"#SBATCH {line}" for line in _directives(config, job, place, left)),
        "",
        *slurm_of(config).setup,
        "set -uo pipefail  # after the setup, which may load what trips over unset variables",
        "",
        *(_verb if is_one_process else _ranks)(config, job, place),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _directives(config: Config, job: str, place: Place, left: Sequence[str]) -> list[str]:
    slurm, run_dir = slurm_of(config), place.run_dir(config)
    has_ranks = job not in _ONE_PROCESS
    log = log_path(run_dir, job, "%A_%a" if job in ARRAYS else "%j")
    options: dict[str, str | int | bool] = {"job-name": f"{run_dir.root.name}-{job}"}
    if job in ARRAYS:
        options["array"] = _array(config, job, left)
    options["nodes"] = slurm.nodes if has_ranks else 1
    tasks = _tasks_per_node(config) if has_ranks else 1
    options["ntasks-per-node"] = tasks
    if has_ranks:
        options.update(_resources(slurm, tasks))
    options["time"] = getattr(slurm.time, ARRAYS.get(job, job))
    named = {"partition": slurm.partition, "account": slurm.account, "qos": slurm.qos}
    options.update({name: value for name, value in named.items() if value is not None})
    options.update({"requeue": True, "open-mode": "append"})
    if has_ranks:
        options["signal"] = "B:USR1@120"
    folder = str(log.parent).replace("%", "%%")
    options.update({"chdir": str(place.directory), "output": f"{folder}/{log.name}"})
    return _words({**options, **slurm.options})


def _array(config: Config, job: str, left: Sequence[str]) -> str:
    slurm, names = slurm_of(config), names_of(config, job)
    at_once = slurm.experts_at_once if job == "experts" else slurm.references_at_once
    indices = [str(place) for place, name in enumerate(names) if name in left]
    whole = len(indices) == len(names)
    listed = f"0-{len(indices) - 1}" if whole else ",".join(indices)
    return listed if at_once is None else f"{listed}%{at_once}"


def _tasks_per_node(config: Config) -> int:
    return 1 if config.launch.kind == "builtin" else launch_line(config).tasks_per_node


def _resources(slurm: Slurm, tasks: int) -> Mapping[str, str | int | bool]:
    gpus = {} if slurm.gpus_per_node is None else {"gpus-per-node": slurm.gpus_per_node}
    if slurm.cpus_per_node is None:
        return {**gpus, "exclusive": True, "mem": 0}
    return {**gpus, "cpus-per-task": slurm.cpus_per_node // tasks}


def _words(options: Mapping[str, str | int | bool]) -> list[str]:
    """Return options as words for a shell; ``false`` takes one away."""
    given = {name: value for name, value in options.items() if value is not False}
    return [
        f"--{name}" if value is True else f"--{name}={shlex.quote(str(value))}"
        for name, value in given.items()
    ]


def _ranks(config: Config, job: str, place: Place) -> Iterator[str]:
    """Yield what starts the ranks of a job, and ends it with their error."""
    run_dir = place.run_dir(config)
    builtin = config.launch.kind == "builtin"
    if job in ARRAYS:
        yield f"{job}=({' '.join(names_of(config, job))})"
        yield f"{ARRAYS[job]}=${{{job}[$SLURM_ARRAY_TASK_ID]}}"
        # One task of an array has the whole array's SLURM_JOB_ID: by it, all would be queued again.
        yield 'job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"'
    else:
        yield 'job="$SLURM_JOB_ID"'
    error = log_path(run_dir, job, "").with_suffix("")
    yield f"config={shlex.quote(str(settings_path(run_dir)))}"
    yield f'error={shlex.quote(str(error))}"$job.error"'
    yield 'rm -f "$error"'
    yield ""
    yield (
        _FUNCTIONS.replace("WATCHED", _watched(run_dir, job)).replace(
            "ADVICE", _advice(config, job)
        )
    )
    yield 'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
    yield "port=$((10000 + SLURM_JOB_ID % 20000))  # jobs that share a node must not share a port"
    yield 'export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"'
    yield from (_worker if builtin else _launches)(config, job, place)


def _advice(config: Config, job: str) -> str:
    limit = f"slurm.time.{ARRAYS.get(job, job)}"
    if job == "search":  # every trial is a save
        return limit
    builtin = config.launch.kind == "builtin"
    return f"{limit}, or lower {'training.save_interval' if builtin else '--save-interval'}"


def _worker(config: Config, job: str, place: Place) -> Iterator[str]:
    """Yield the start of the built-in trainer's ranks."""
    slurm = slurm_of(config)
    ranks = config.parallel.processes // slurm.nodes
    yield f"{_srun(slurm, *_cores(slurm, 1))} \\"
    yield f"    {_python(slurm, place)} -m torch.distributed.run \\"
    yield f"    --nnodes={slurm.nodes} --nproc-per-node={ranks} {' '.join(RENDEZVOUS[:1])} \\"
    yield f"    {' '.join(RENDEZVOUS[1:])} \\"
    yield f'    -m megatron_mergemix.jobs.worker {_WORK[job]} --error-file="$error" &'
    yield "wait_for_ranks"


def _launches(config: Config, job: str, place: Place) -> Iterator[str]:
    """Yield the stages of a job, each a launch of the user's own."""
    run_dir = place.run_dir(config)
    line = launch_line(config)
    yield f'export {ERROR_FILE}="$error"'
    yield from line.exports
    yield ""
    if job == "search":
        yield from _launch(config, line, "--mergemix-stage search")
        return
    yield _FINISHED
    if job == "experts":
        yield from _launch(config, line, '--mergemix-stage expert --mergemix-expert "$expert"')
        yield f"check_finished {_watched(run_dir, job)}"
        return
    mixture = '--mergemix-mixture "$reference"'
    yield from _launch(config, line, f"--mergemix-stage reference {mixture}")
    yield f"check_finished {_watched(run_dir, job)}"
    yield from _launch(config, line, f"--mergemix-stage evaluate {mixture}")
    model = f'--mergemix-model "{proxy_word("$reference")}"'
    yield from _launch(config, line, f"--mergemix-stage evaluate {model}")


def _launch(config: Config, line: LaunchLine, flags: str) -> Iterator[str]:
    slurm = slurm_of(config)
    yield f"{_srun(slurm, *_cores(slurm, line.tasks_per_node))} \\"
    yield from (f"    {text} \\" for text in _folded(line.words))
    yield f'    --mergemix-config "$config" {flags} &'
    yield "wait_for_ranks"


def _folded(words: Sequence[str]) -> Iterator[str]:
    """Yield words in lines that can be read; an option begins a line if its values do not fit."""
    line = ""
    for place, word in enumerate(words):
        values = itertools.takewhile(lambda text: not text.startswith("-"), words[place + 1 :])
        whole = " ".join([word, *values]) if word.startswith("-") else word
        needed = whole if len(whole) <= _WIDTH else word
        if line and len(line) + 1 + len(needed) > _WIDTH:
            yield line
            line = word
        else:
            line = f"{line} {word}".lstrip()
    yield line


def _watched(run_dir: RunDir, job: str) -> str:
    """Return the folder, as a word of shell, in which a job's saves show that it gets on."""
    if job in ARRAYS:
        return shlex.quote(str(run_dir.root / job)) + f'/"${ARRAYS[job]}"'
    return shlex.quote(str(run_dir.base if job == "base" else run_dir.trials.parent))


def _verb(config: Config, job: str, place: Place) -> Iterator[str]:
    """Yield what runs one verb in a single process."""
    slurm = slurm_of(config)
    settings = shlex.quote(str(settings_path(place.run_dir(config))))
    yield f"{_srun(slurm, '--nodes=1', '--ntasks=1')} \\"
    yield f"    {_python(slurm, place)} -m megatron_mergemix {_ONE_PROCESS[job]} {settings}"


def _cores(slurm: Slurm, tasks: int) -> list[str]:
    return (
        [] if slurm.cpus_per_node is None else [f"--cpus-per-task={slurm.cpus_per_node // tasks}"]
    )


def _srun(slurm: Slurm, *options: str) -> str:
    return " ".join(["srun", "--kill-on-bad-exit=1", *options, *_words(slurm.srun)])


def _python(slurm: Slurm, place: Place) -> str:
    return slurm.python or shlex.quote(place.python)
