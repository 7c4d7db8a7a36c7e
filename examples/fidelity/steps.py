"""Steps of the study: each a few commands of ``mergemix``, done once, two or more at a time.

A step that is done has a file that says what was done; started again, the study goes on with the
others. A step that was killed begins again, and ``mergemix`` continues what is half done in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # the parallelism is in the steps
    # glibc gives large tensors back to the system when they are freed, and every step of training
    # would fault the same pages in again.
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**26),
}
"""Of every command."""

MERGE_ALL = """
import json, sys
from megatron_mergemix.cli import main
for words in json.loads(sys.argv[1]):
    if code := main(words):
        sys.exit(code)
"""


@dataclass(frozen=True)
class Step:
    """One piece of work.

    Attributes:
        folder: where it leaves its results; also its name.
        work: does it, given a :class:`Folder`.
        needs: folders of steps that come before.
        about: everything that the result depends on and that is decided in this study, besides
            what the steps that it needs are about; a step that was done for something else is
            refused.
    """

    folder: Path
    work: Callable[[Folder], None]
    needs: tuple[Path, ...] = ()
    about: tuple[str, ...] = ()


@dataclass
class Folder:
    """The folder of a step, and how commands are run for it."""

    path: Path

    def mergemix(self, verb: str, *words: str) -> None:
        """Run one command, its output in ``log.txt``.

        Raises:
            RuntimeError: it failed; quotes its last lines.
        """
        self._run(["-m", "megatron_mergemix", verb, *words])

    def merge_all(self, merges: Iterable[Sequence[str]]) -> None:
        """Run ``mergemix merge`` with each of these words, all in one process: torch is imported
        once.

        Raises:
            RuntimeError: one failed.
        """
        self._run(["-c", MERGE_ALL, json.dumps([["merge", *words] for words in merges])])

    def _run(self, words: Sequence[str]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        log = self.path / "log.txt"
        environment = os.environ | ENVIRONMENT
        environment.setdefault("MERGEMIX_DEVICE", "cpu")
        command = [sys.executable, *words]
        with log.open("a") as file:
            print("+", *command[2:], file=file, flush=True)
            done = subprocess.run(
                command, stdout=file, stderr=file, env=environment, cwd=REPOSITORY, check=False
            )
        if done.returncode != 0:
            end = log.read_text().splitlines()[-8:]
            raise RuntimeError("\n".join([f"{log} ends with:", *end]))


class Interrupted(Exception):
    """A step failed; those under way were finished, no other was begun."""


def do_all(steps: Sequence[Step], at_once: int) -> None:
    """Do every step that is not done, in an order in which each has what it needs.

    Raises:
        Interrupted: a step failed; says which and why.
    """
    digests = _digests(steps)
    done = {step.folder for step in steps if _is_done(step, digests[step.folder])}
    left = [step for step in steps if step.folder not in done]
    running: dict[Future[None], Step] = {}
    began = time.monotonic()
    print(f"{len(done)} of {len(steps)} steps are done", flush=True)
    with ThreadPoolExecutor(at_once) as pool:
        while left or running:
            ready = [step for step in left if done.issuperset(step.needs)]
            for step in ready[: at_once - len(running)]:
                running[pool.submit(_do, step, digests[step.folder])] = step
                left.remove(step)
            assert running, f"needs no step provides: {[step.folder for step in left]}"
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                step = running.pop(future)
                if (error := future.exception()) is not None:
                    raise Interrupted(f"{step.folder}: {error}") from error
                done.add(step.folder)
                minutes = (time.monotonic() - began) / 60
                print(f"{len(done)}/{len(steps)}  {step.folder}  {minutes:.1f} min", flush=True)


def _do(step: Step, digest: str) -> None:
    step.folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    step.work(Folder(step.folder))
    temporary = step.folder / "done.tmp"
    seconds = round(time.monotonic() - began)
    record = {
        "about": step.about,
        "digest": digest,
        "seconds": seconds,
        "ended": round(time.time()),
    }
    temporary.write_text(json.dumps(record))
    os.replace(temporary, step.folder / "done.json")


def _is_done(step: Step, digest: str) -> bool:
    path = step.folder / "done.json"
    if not path.exists():
        return False
    record = json.loads(path.read_text())
    if record["digest"] == digest:
        return True
    before, now = set(record["about"]), set(step.about)
    raise Interrupted(
        f"{step.folder} was done for {sorted(before - now)}, now it would be for "
        f"{sorted(now - before)}. Use another --out, or remove the folder."
        if before != now
        else f"{step.folder} was done with steps before it that have changed since. Use another "
        "--out, or remove the folder."
    )


def _digests(steps: Sequence[Step]) -> Mapping[Path, str]:
    """Return what tells each step from the same one about something else, by its folder."""
    by_folder = {step.folder: step for step in steps}
    found: dict[Path, str] = {}

    def digest(folder: Path) -> str:
        if folder not in found:
            step = by_folder[folder]
            parts = [*step.about, *(digest(need) for need in step.needs)]
            found[folder] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        return found[folder]

    for folder in by_folder:
        digest(folder)
    return found
