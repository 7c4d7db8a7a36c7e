#!/usr/bin/env python
"""Candidates per hour of the search in place, beside merging every candidate to disk.

    python tools/bench_search.py --folder /tmp/bench-search [--size quickstart] \\
        [--mergekit ~/mk/bin/mergekit-yaml]

Three ways to score the same mixtures of the same checkpoints on the same windows, in fp32 on the
CPU, with the same number of threads:

in place    one job holds base and experts; a candidate is merged into the live model and scored
files       ``mergemix merge`` writes the candidate, and a new process loads and scores it
mergekit    ``mergekit-yaml`` writes it, and a new process loads it with transformers and scores it

The three take turns, candidate by candidate, so that a machine that gets slower is slow for all.
All must find the same losses to fp32 rounding. The ways differ in what a candidate costs beside its
evaluation, so the ratio falls as the windows become more. The search in place starts once; its
start counts in the hour as one part in ``--trials``.

With ``--cpu-clock`` seconds are those that the processor spent, on one thread: on a machine that
others use, they are what an idle machine would show on the wall, but for waiting for the disk,
which only the other two do.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bench_models import candidates, write_experiment

HERE = Path(__file__).parent
WORKER = [sys.executable, "-W", "ignore", str(HERE / "bench_search_worker.py")]
EXPERTS = 4
SEQ_LENGTH = 128
MICRO_BATCH = 16
TARGET = 20.0
ROUNDING = 1e-5
"""Relative difference of two losses that fp32 sums in another order may have."""

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2},
    "quickstart": {"num_layers": 3, "hidden_size": 64, "num_attention_heads": 4},
    "1M": {"num_layers": 4, "hidden_size": 128, "num_attention_heads": 4},
    "8M": {"num_layers": 8, "hidden_size": 288, "num_attention_heads": 8},
}
"""Name -> model; ``quickstart`` is that of examples/quickstart."""


Scored = Callable[[Mapping[str, float]], tuple[float, dict[str, float]]]
"""Merge weights -> the loss, and the seconds of every part."""


@dataclass
class Way:
    """One way to score candidates: seconds of each part and losses, one entry per candidate."""

    label: str
    parts: dict[str, list[float]] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)

    def add(self, loss: float, seconds: Mapping[str, float]) -> None:
        """Keep one candidate."""
        self.losses.append(loss)
        for part, value in seconds.items():
            self.parts.setdefault(part, []).append(value)

    def median(self) -> float:
        """Return the median of the seconds of a candidate, its parts together."""
        return statistics.median(map(sum, zip(*self.parts.values(), strict=True)))


class InPlace:
    """The job that holds base and experts, for as long as the ``with`` block lasts."""

    def __init__(self, mix: Path) -> None:
        self._mix = mix

    def __enter__(self) -> InPlace:
        begun = time.perf_counter()
        command = [*WORKER, "search", str(self._mix)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        ready = answered(self._process)["ready"]
        self.start = ready if cpu_clock() else time.perf_counter() - begun
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def score(self, alpha: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        """Return loss and seconds of one candidate."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(alpha) + "\n")
        self._process.stdin.flush()
        record = answered(self._process)
        return record["loss"], record["seconds"]


def cpu_clock() -> bool:
    """Say whether processor seconds are counted, here and in every process that is measured."""
    return os.environ.get("BENCH_CLOCK") == "cpu"


def answered(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Return the next answer of the worker."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("@"):
            record: dict[str, Any] = json.loads(line[1:])
            return record
    raise SystemExit(f"the worker ended with exit code {process.wait()}")


def run(command: Sequence[str]) -> tuple[str, float]:
    """Return what a command printed last, and the seconds of its process."""
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True)
    taken, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    if cpu_clock():
        taken = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    if done.returncode:
        raise SystemExit(f"{list(command)} failed:\n{done.stdout}{done.stderr}")
    lines = [line for line in done.stdout.splitlines() if line.startswith(("@", "{"))]
    return (lines[-1] if lines else "").lstrip("@"), taken


def by_files(mix: Path, alpha: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """Merge one candidate to disk with ``mergemix merge``, and score it in a new process."""
    output = mix.parent / "merged"
    shutil.rmtree(output, ignore_errors=True)
    weights = [f"{name}={weight!r}" for name, weight in alpha.items()]
    merge = [sys.executable, "-m", "megatron_mergemix", "merge", "--config", str(mix)]
    _, merging = run([*merge, "--alpha", *weights, "--output", str(output)])
    answer, scoring = run([*WORKER, "score", str(mix), str(output)])
    return _told(answer, merging, scoring)


def by_mergekit(
    program: Path, mix: Path, windows: Path, alpha: Mapping[str, float]
) -> tuple[float, dict[str, float]]:
    """Merge one candidate to disk with mergekit, and score it with transformers beside it."""
    models, output = mix.parent / "llama", mix.parent / "mergekit"
    shutil.rmtree(output, ignore_errors=True)
    weighted = [
        {"model": str(models / name), "parameters": {"weight": weight}}
        for name, weight in alpha.items()
    ]
    recipe = {"merge_method": "linear", "models": weighted, "dtype": "float32"}
    recipe["parameters"] = {"normalize": False}
    file = mix.parent / "mergekit.yml"
    file.write_text(json.dumps(recipe))  # JSON is YAML
    _, merging = run([str(program), str(file), str(output)])
    python, script = program.parent / "python", HERE / "bench_search_transformers.py"
    answer, scoring = run([str(python), str(script), str(output), str(windows), str(MICRO_BATCH)])
    return _told(answer, merging, scoring)


def _told(answer: str, merging: float, scoring: float) -> tuple[float, dict[str, float]]:
    """Return the loss, and the seconds of a candidate by what they went into."""
    record = json.loads(answer)
    ends = list(record["ends"].values())
    parts = [after - before for before, after in zip([0.0, *ends], ends, strict=False)]
    seconds = dict(zip(("start", "load", "evaluate"), parts, strict=True))
    # What the process did before its clock ran, and after it.
    seconds["start"] += scoring - ends[-1]
    return record["loss"], {"merge process": merging, **seconds}


def compare(ways: Sequence[Way]) -> None:
    """Refuse ways that find different losses."""
    first = ways[0]
    for way in ways[1:]:
        for number, (one, other) in enumerate(zip(first.losses, way.losses, strict=True)):
            if abs(one - other) > ROUNDING * abs(one):
                raise SystemExit(
                    f"candidate {number}: {first.label} finds a loss of {one:.8f}, {way.label} "
                    f"{other:.8f}; expected the same to {ROUNDING:g} of it."
                )
        apart = max(
            abs(one - other) / abs(one) for one, other in zip(first.losses, way.losses, strict=True)
        )
        print(f"losses of {way.label} and {first.label} differ by {apart:.1e} at most")


def report(ways: Sequence[Way], start: float, trials: int) -> None:
    """Print where time goes, candidates per hour, and how many times faster the first way is."""
    own = ways[0]
    for way in ways:
        spent = ", ".join(f"{part} {statistics.median(v):.3f}" for part, v in way.parts.items())
        print(f"{way.label:10} {way.median():8.3f} s per candidate: {spent}")
    started = own.median() + start / trials
    print(f"{own.label} starts once, in {start:.1f} s: {start / trials:.3f} s per candidate")
    for way in ways:
        each = started if way is own else way.median()
        print(f"{way.label:10} {3600 / each:10,.0f} candidates per hour in a search of {trials}")
    beside = started - statistics.median(own.parts["evaluate"])
    for way in ways[1:]:
        ratio, running = way.median() / started, way.median() / own.median()
        rest = way.median() - statistics.median(way.parts["evaluate"])
        print(
            f"in place is {ratio:.1f} times as fast as {way.label} ({running:.1f} times once it "
            f"runs)  >= {TARGET:g}  {'met' if ratio >= TARGET else 'MISSED'}; beside evaluating, "
            f"a candidate takes {beside:.3f} s and {rest:.3f} s, {rest / beside:.0f} times"
        )


def measure(args: argparse.Namespace, num_windows: int) -> None:
    """Make what is missing, let the ways take turns, check that they agree, and print."""
    model = {**SIZES[args.size], "seq_length": SEQ_LENGTH}
    folder = args.folder / f"{args.size}-{num_windows}"
    mix = write_experiment(folder, model, EXPERTS, num_windows, MICRO_BATCH)
    windows = folder / "windows.npy"
    run([*WORKER, "make", str(mix), str(windows)])
    with InPlace(mix) as job:
        ways: dict[str, Scored] = {"in place": job.score, "files": partial(by_files, mix)}
        if args.mergekit:
            ways["mergekit"] = partial(by_mergekit, args.mergekit, mix, windows)
        found = {label: Way(label) for label in ways}
        alphas = candidates([f"domain{number}" for number in range(EXPERTS)], args.candidates)
        job.score(alphas[0])  # warms up
        for alpha in alphas:
            for label, scored in ways.items():
                found[label].add(*scored(alpha))
    size = sum(file.stat().st_size for file in (folder / "llama" / "base").glob("*.safetensors"))
    print(
        f"{args.size}: {size // 4:,} parameters in fp32, {EXPERTS} experts, {num_windows} windows "
        f"of {SEQ_LENGTH} tokens, {os.environ.get('OMP_NUM_THREADS', 'all')} threads, "
        f"{'processor' if cpu_clock() else 'wall'} seconds, medians of {args.candidates} "
        f"candidates, load {os.getloadavg()[0]:.1f}"
    )
    compare(list(found.values()))
    report(list(found.values()), job.start, args.trials)


def main() -> None:
    """Measure with every number of windows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="made if missing, and kept")
    add("--size", choices=SIZES, default="quickstart", help="of the model (default: quickstart)")
    add(
        "--windows",
        type=int,
        nargs="+",
        default=[64, 256],
        help=f"of {SEQ_LENGTH} tokens, in all (default: 64, and the 256 of the quickstart)",
    )
    add("--candidates", type=int, default=3, help="scored by every way (default: 3)")
    add("--trials", type=int, default=40, help="of the search that starts once (default: 40)")
    add("--mergekit", metavar="PROGRAM", type=Path, help="mergekit-yaml, transformers beside it")
    add("--cpu-clock", action="store_true", help="processor seconds, one thread")
    args = parser.parse_args()
    if args.cpu_clock:
        os.environ |= {"BENCH_CLOCK": "cpu", "OMP_NUM_THREADS": "1"}
    for number in args.windows:
        measure(args, number)


if __name__ == "__main__":
    main()
