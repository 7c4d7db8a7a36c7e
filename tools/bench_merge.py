"""Measure ``mergemix merge`` against what the machine can do, in one run.

    python tools/bench_merge.py --folder /tmp/bench --mergekit ~/mk/bin/mergekit-yaml

Makes GPT checkpoints in bf16 and merges a base and three experts by task arithmetic, in a process
of its own. What is compared runs in turn, round by round, so that a machine that gets slower is
slow for all. The page cache is warm, with pages to spare, and every output is a new file.

The bound is ``cat`` of three inputs and a copy of the fourth: as many bytes in, as many out. The
faster of two copies counts: ``cp``, which may copy within the kernel, and ``dd``, which reads and
writes as a merge has to. A merge waits for the disk and is compared with a copy that does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from bench_merge_inputs import EXPERTS, shapes, write_hugging_face, write_megatron
from isal.isal_zlib import crc32

NOT_SYNCED = (
    "import os, sys; os.fsync = lambda *a: None; os.posix_fadvise = lambda *a: None; "
    "sys.argv[0] = 'mergemix'; from megatron_mergemix.cli import main; sys.exit(main())"
)
"""Runs the command without a word to the disk, to compare it with a copy that says none."""


@dataclass
class Figures:
    """What was measured of one thing, one entry per round.

    Attributes:
        label: names it in the table.
        whole: seconds of the whole process.
        net: seconds without start-up, by the program's own clock, where it tells.
        peak: most anonymous bytes of all its processes at once.
    """

    label: str
    whole: list[float] = field(default_factory=list)
    net: list[float] = field(default_factory=list)
    peak: int = 0

    def row(self, moved: float) -> str:
        """Return a line of the table."""
        low = min(self.net or self.whole)
        columns = [f"{self.label:46} {min(self.whole):8.3f} {statistics.median(self.whole):8.3f}"]
        columns.append(f"{low:8.3f} {statistics.median(self.net):8.3f}" if self.net else " " * 17)
        columns.append(f"{moved / low / 1e9:7.2f}" if moved else " " * 7)
        columns.append(f"{self.peak / 1e9:7.2f}" if self.peak else "")
        return " ".join(columns).rstrip()


class Watched:
    """A process and the most anonymous memory that it and its children had at once."""

    def __init__(self, command: Sequence[str]) -> None:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.peak = 0
        watcher = threading.Thread(target=self._watch, args=(process,))
        watcher.start()
        output, _ = process.communicate()
        self.seconds = time.perf_counter() - started
        self.output = output.decode()
        watcher.join()
        if process.returncode:
            raise SystemExit(f"{list(command)} failed:\n{self.output}")

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None:
            self.peak = max(self.peak, _anonymous(process.pid))
            time.sleep(0.01)


def _anonymous(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    own = re.search(r"RssAnon:\s+(\d+) kB", status)
    return (int(own[1]) * 1024 if own else 0) + sum(_anonymous(int(child)) for child in children)


def _take_pages(folder: Path) -> None:
    """Have pages at hand for the page cache.

    A virtual machine gives pages that are free for two seconds back to its host, and whoever is
    next to write to them waits for it, which can take longer than all else.
    """
    wanted = sum(file.stat().st_size for file in (folder / "base").iterdir())
    scratch = folder / "scratch"
    with scratch.open("wb", buffering=0) as file:
        for _ in range(0, min(2 * wanted, 1 << 31), len(_ZEROS)):
            file.write(_ZEROS)
    scratch.unlink()


_ZEROS = bytes(1 << 24)

Task = tuple[Figures, Callable[[Figures], None]]


def command(
    label: str, words: Sequence[str], output: Path, clock: str = "", *, memory: bool = True
) -> Task:
    """Return a command to be measured; ``output`` is removed beforehand, off the clock.

    Args:
        label: names it in the table.
        words: the command.
        output: folder that it writes.
        clock: what stands before the seconds that the program says it took.
        memory: whether its memory is of interest.
    """

    def run(figures: Figures) -> None:
        shutil.rmtree(output, ignore_errors=True)
        os.sync()  # nobody waits for what the one before left to the disk
        _take_pages(output.parent)
        done = Watched(words)
        figures.whole.append(done.seconds)
        if clock:
            found = re.search(clock + r"([0-9.]+) ?s", done.output)
            assert found is not None, done.output
            figures.net.append(float(found[1]))
        if memory:
            figures.peak = max(figures.peak, done.peak)

    return Figures(label), run


def inside(label: str, work: Callable[[], object]) -> Task:
    """Return a function to be measured in this process."""

    def run(figures: Figures) -> None:
        started = time.perf_counter()
        work()
        figures.whole.append(time.perf_counter() - started)

    return Figures(label), run


def copy(label: str, folder: Path, text: str, *, sync: bool = False) -> Task:
    """Return reading the experts and copying the base; ``text`` copies ``$file`` to ``$copy``."""
    target = folder / "copy"
    cat = " ".join(f"{folder / name}/*.distcp" for name in EXPERTS)
    script = f"cat {cat} > /dev/null && mkdir {target} && for file in {folder}/base/*.distcp; do "
    script += f"copy={target}/${{file##*/}}; {text} || exit 1; done"
    script += f" && sync {target}/*" if sync else ""
    return command(label, ["sh", "-c", script], target, memory=False)


def merge(label: str, folder: Path, options: Sequence[str] = (), *, sync: bool = True) -> Task:
    """Return a merge by this project."""
    start = ["-m", "megatron_mergemix"] if sync else ["-c", NOT_SYNCED]
    words = [sys.executable, *start, "merge", "--method", "task_arithmetic", "--scale", "0.9"]
    words += ["--base", str(folder / "base"), "--output", str(folder / "out")]
    words += [f"--expert={folder / name}=0.3" for name in EXPERTS]
    return command(label, [*words, *options], folder / "out", r" in ")


def mergekit(program: str, folder: Path, parameters: float) -> Task:
    """Return the same merge by mergekit, of Hugging Face models of the same size."""
    for number, name in enumerate(("base", *EXPERTS)):
        if not (folder / name).exists():
            write_hugging_face(folder / name, parameters, number)
    experts = [{"model": str(folder / n), "parameters": {"weight": 0.3}} for n in EXPERTS]
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "models": experts,
        "parameters": {"lambda": 0.9, "normalize": False},
        "dtype": "bfloat16",
    }
    (folder / "mergekit.yml").write_text(json.dumps(recipe))  # JSON is YAML
    words = [program, str(folder / "mergekit.yml"), str(folder / "out")]
    return command("mergekit task_arithmetic", words, folder / "out")


def nvidia(checkout: Path, folder: Path) -> Task:
    """Return the same merge by Megatron-LM's own tool, on the same checkpoints."""
    words = [sys.executable, str(checkout / "tools/checkpoint/weighted_merge.py")]
    words += ["--merge-output", str(folder / "nvidia"), "--merge-inputs", f"{folder / 'base'}:0.19"]
    words += [f"{folder / name}:0.27" for name in EXPERTS]
    return command("Megatron-LM weighted_merge.py", words, folder / "nvidia", r" total=")


def checkpoints(root: Path, parameters: float, moments: bool = False) -> Path:
    """Return a folder with base and experts, made if they are missing."""
    folder = root / f"{parameters / 1e6:g}M{'_moments' if moments else ''}"
    for number, name in enumerate(("base", *EXPERTS)):
        if not (folder / name / "metadata.json").exists():
            shutil.rmtree(folder / name, ignore_errors=True)
            write_megatron(folder / name, parameters, number, moments)
    return folder


def bounds(folder: Path) -> dict[str, Task]:
    """Return what moves as many bytes without looking at them."""
    source = np.ones(1 << 28, dtype=np.uint8)
    target = source.copy()
    dd = 'dd if="$file" of="$copy" bs=1M status=none'
    return {
        "cp": copy("cat 3, cp 1", folder, 'cp "$file" "$copy"'),
        "dd": copy("cat 3, dd 1", folder, dd),
        "cp_sync": copy("cat 3, cp 1, fsync", folder, 'cp "$file" "$copy"', sync=True),
        "dd_sync": copy("cat 3, dd 1, fsync", folder, dd, sync=True),
        "memcpy": inside("memcpy of 0.27 GB, one core", lambda: np.copyto(target, source)),
        "crc32": inside("CRC-32 of 0.27 GB, one core", lambda: crc32(source.data)),
    }


def verdicts(found: dict[str, Figures], grown: str) -> list[str]:
    """Return one line per target: what was measured, and whether it is met."""
    lines = []

    def judge(what: str, value: float, limit: float, unit: str, *, at_least: bool = False) -> None:
        met = value >= limit if at_least else value <= limit
        sign = ">=" if at_least else "<="
        lines.append(f"{what:58} {value:7.2f}{unit}  {sign} {limit:g}{unit}  {_word(met)}")

    ours = found["default"]
    plain = min(min(found[kind].whole) for kind in ("cp", "dd"))
    synced = min(min(found[kind].whole) for kind in ("cp_sync", "dd_sync"))
    share = "share of the bound, net of start-up"
    for name, limit in (("default", synced), ("trusting", synced), ("not_synced", plain)):
        label = f"{share}: {found[name].label.removeprefix('mergemix merge').strip() or 'default'}"
        judge(label, limit / min(found[name].net), 0.7, "", at_least=True)
    start = min(w - n for w, n in zip(ours.whole, ours.net, strict=True))
    judge("start-up", start, 2.5, " s")
    for name in ("default", "workers"):
        judge(f"anonymous memory: {found[name].label}", found[name].peak / 1e9, 0.4, " GB")
    if grown in found:
        judge("memory of a model four times as large", found[grown].peak / ours.peak, 1.1, "x")
    if "moments" in found:
        slower = min(found["moments"].net) / min(ours.net)
        judge("time with optimizer state beside the weights", slower, 1.1, "x")
    for name, least in (("mergekit", 4.0), ("nvidia", 1.0)):
        if name in found:
            ratio = min(found[name].whole) / min(ours.whole)
            judge(f"faster than {found[name].label}, whole", ratio, least, "x", at_least=True)
    return lines


def _word(met: bool) -> str:
    return "met" if met else "MISSED"


def main() -> None:
    """Make the checkpoints that are missing, then measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="made if missing, and kept")
    add("--size", type=float, default=0.5e9, help="parameters (default: 0.5e9)")
    add("--repeats", type=int, default=3, help="rounds (default: 3)")
    add("--moments", action="store_true", help="also with optimizer state beside the weights")
    add("--grow", action="store_true", help="also a model four times as large, once, for memory")
    add("--mergekit", metavar="PROGRAM", help="mergekit-yaml, to compare")
    add("--nvidia", metavar="CHECKOUT", type=Path, help="Megatron-LM with weighted_merge.py")
    options = parser.parse_args()
    folder = checkpoints(options.folder, options.size)
    parameters = sum(int(np.prod(shape)) for shape in shapes(options.size).values())
    moved = 5 * 2 * parameters
    imports = [sys.executable, "-c", "import torch"]
    tasks = bounds(folder) | {
        "import": command("import torch", imports, folder / "out", memory=False),
        "default": merge("mergemix merge", folder),
        "trusting": merge("mergemix merge --no-verify", folder, ["--no-verify"]),
        "not_synced": merge(
            "mergemix merge --no-verify, no fsync", folder, ["--no-verify"], sync=False
        ),
        "workers": merge("mergemix merge --workers 2", folder, ["--workers", "2"]),
    }
    if options.moments:
        beside = checkpoints(options.folder, options.size, moments=True)
        tasks["moments"] = merge("mergemix merge, optimizer state beside", beside)
    if options.mergekit:
        models = options.folder / f"{options.size / 1e6:g}M_hf"
        tasks["mergekit"] = mergekit(options.mergekit, models, options.size)
    if options.nvidia:
        tasks["nvidia"] = nvidia(options.nvidia, folder)
    for number in range(options.repeats):
        for name, (figures, run) in tasks.items():
            print(f"round {number + 1}: {name}", file=sys.stderr, flush=True)
            run(figures)
    if options.grow:
        large = checkpoints(options.folder, 4 * options.size)
        tasks["grown"] = merge("mergemix merge, four times as large", large)
        tasks["grown"][1](tasks["grown"][0])
    print(f"{parameters:,} parameters; base + 3 experts -> 1: {moved / 1e9:.2f} GB moved")
    print(f"{os.cpu_count()} processors, warm cache, {options.repeats} rounds; seconds, GB/s, GB")
    print(f"{'':46} {'whole':>8} {'median':>8} {'net':>8} {'median':>8} {'GB/s':>7} {'anon':>7}")
    amounts = {"memcpy": 1 << 28, "crc32": 1 << 28, "import": 0, "grown": 4 * moved}
    for name, (figures, _) in tasks.items():
        print(figures.row(amounts.get(name, moved)))
    print()
    for line in verdicts({name: figures for name, (figures, _) in tasks.items()}, "grown"):
        print(line)


if __name__ == "__main__":
    main()
