"""Programs of the user's own: they get a candidate as a checkpoint and leave a JSON file."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from megatron_mergemix.config.evaluate import CommandTask
from megatron_mergemix.errors import ConfigError, EvaluationError
from megatron_mergemix.evaluate import supervise
from megatron_mergemix.evaluate.command_digest import command_digest
from megatron_mergemix.evaluate.proxy import OnDisk, Proxy
from megatron_mergemix.evaluate.scratch import Scratch
from megatron_mergemix.processes.distributed import from_rank_0
from megatron_mergemix.processes.process_life import without_torchrun
from megatron_mergemix.trials import Score, Scores

GRACE = 5.0
"""Seconds between asking a command to end and ending it."""

TAIL_LINES = 10


class CommandEvaluator:
    """Scores a proxy by every capability with a ``command``.

    Rank 0 writes the candidate and starts the commands while all others wait, so replicas of the
    model share every candidate.
    """

    def __init__(
        self, tasks: Mapping[str, CommandTask], scratch: Scratch | None, logs: Path, at_once: int
    ) -> None:
        """Prepare.

        Args:
            tasks: capability -> its command.
            scratch: where candidates are written; rank 0 only, None elsewhere.
            logs: folder of the output of the commands: ``<capability>/<candidate>.log``.
            at_once: commands that run at the same time.
        """
        self._tasks, self._scratch, self._logs, self._at_once = tasks, scratch, logs, at_once
        self._name = "candidate"
        self._lives: set[subprocess.Popen[bytes]] = set()
        self._lock, self._is_stopped = threading.Lock(), False

    def begin(self, name: str) -> None:
        """Say what the next candidate is called; its logs get the name."""
        self._name = name

    def evaluate(self, proxy: Proxy) -> Scores:
        """Collective, over all ranks: return the numbers that the commands leave.

        Raises:
            EvaluationError: a command failed or left no such number; on every rank alike.
        """
        assert isinstance(proxy, OnDisk), f"{type(proxy).__name__} is no merge of checkpoints"
        merged = proxy.merged_from
        scores, error = from_rank_0(lambda: self._scores(merged))
        if error is not None:
            raise EvaluationError(error)
        return scores

    def evaluate_first(self, proxy: Proxy) -> Scores:
        """Collective, over all ranks: return all numbers; what a command scores cannot be split.

        Raises:
            EvaluationError: as :meth:`evaluate`.
        """
        return self.evaluate(proxy)

    def evaluate_others(self, proxy: Proxy, first: Scores) -> Scores:
        """Return what was scored before, which was everything."""
        return {name: first[name] for name in self._tasks}

    def evaluate_held_out(self, proxy: Proxy) -> Scores:
        """Return nothing: what a command scores cannot be split."""
        return {}

    def _scores(self, merged: Any) -> tuple[Scores, str | None]:
        """Return the scores, or why there are none; rank 0 only."""
        assert self._scratch is not None, "rank 0 has one"
        self._is_stopped = False
        try:
            with self._scratch.holding(merged) as folder:
                with ThreadPoolExecutor(self._at_once) as pool:
                    futures = {
                        name: pool.submit(self._score, name, task, folder)
                        for name, task in self._tasks.items()
                    }
                    try:
                        wait(futures.values())
                    finally:
                        self._stop()  # nothing runs any more, unless this process is leaving
                return {name: future.result() for name, future in futures.items()}, None
        except EvaluationError as error:
            return {}, str(error)

    def _score(self, name: str, task: CommandTask, folder: Path) -> Mapping[str, Score]:
        """Run one command, again if it fails and may be retried, and read what it leaves."""
        output, log = folder / f"{name}.json", self._logs / name / f"{self._name}.log"
        places = {"{checkpoint}": str(folder / "candidate"), "{output}": str(output)}
        words = [_filled(word, places) for word in task.run]
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)  # of a start that was killed
        attempts, before = 1 + task.retries, command_digest(task)
        for attempt in range(1, attempts + 1):
            output.unlink(missing_ok=True)
            how = self._run(words, task.timeout, log)
            _check_same_files(name, before, command_digest(task))
            try:
                if how is not None:
                    raise EvaluationError(f"the command of capability {name} {how}.{_tail(log)}")
                return _read(name, task, output, log)
            except EvaluationError as error:
                if self._is_stopped or attempt == attempts:
                    more = f" (attempt {attempt} of {attempts})" if attempts > 1 else ""
                    raise EvaluationError(f"{error}{more}") from None
        raise AssertionError("the last attempt returns or raises")

    def _run(self, words: Sequence[str], timeout: float, log: Path) -> str | None:
        """Run the words; return how they failed, None where they did not."""
        numbers = (str(os.getpid()), str(timeout), str(GRACE))
        with log.open("ab") as written:
            since = time.strftime("%Y-%m-%d %H:%M:%S %z")
            written.write(f"--- {since}: {json.dumps(words)}\n".encode())
            written.flush()
            with self._lock:
                if self._is_stopped:
                    return "was not started any more"
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", supervise.__file__, *numbers, *words],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=written,
                    env=without_torchrun(os.environ),
                    start_new_session=True,
                )
                self._lives.add(process)
            said, _ = process.communicate()
            with self._lock:
                self._lives.discard(process)
        if said:
            return _how(json.loads(said), timeout)
        if process.returncode < 0 and not self._is_stopped:
            number = -process.returncode
            return f"was lost: what watches it was killed by signal {number}, see `dmesg`"
        return _how({"ended": "told to"}, timeout)

    def _stop(self) -> None:
        """End whatever still runs; on the way out of the job alone is there any."""
        with self._lock:
            self._is_stopped = True
            for process in self._lives:
                process.terminate()


def _check_same_files(name: str, before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Refuse what scores would never be on record for.

    Raises:
        ConfigError: a file among the words is not what it was.
    """
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    if changed:
        files = " and ".join(key.removeprefix(".file.") for key in changed)
        raise ConfigError(
            f"evaluate.capabilities.{name}: while the command ran, {files} changed, which is among "
            "its words, so that scores depend on what is in it. If the command writes there, let "
            "its words name the folder instead; if you changed it, put it back and start again, or "
            "begin a search of its own."
        )


def _filled(word: str, places: Mapping[str, str]) -> str:
    for placeholder, path in places.items():
        word = word.replace(placeholder, path)
    return word


def _how(ended: Mapping[str, Any], timeout: float) -> str | None:
    kind = ended["ended"]
    if kind == "exit":
        return None if ended["code"] == 0 else f"ended with exit code {ended['code']}"
    if kind == "signal":
        name = f"signal {ended['signal']}"
        with contextlib.suppress(ValueError):
            name += f" ({signal.Signals(ended['signal']).name})"
        return f"was killed by {name}"
    if kind == "timeout":
        return f"took longer than its timeout of {timeout:g} s and was killed"
    return f"cannot be started: {ended['why']}" if kind == "not started" else "was told to end"


def _tail(log: Path) -> str:
    """Return where the output of a command is, and how it ends."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line for line in lines if not line.startswith("--- ")]
    last = "".join(f"\n  {line}" for line in said[-TAIL_LINES:])
    return f" Its output is in {log}" + (f"; the end of it:{last}" if last else "; there is none.")


def _read(name: str, task: CommandTask, output: Path, log: Path) -> dict[str, Score]:
    """Return all numbers of the JSON, those that the utility needs among them."""
    where = f"the command of capability {name} ended well, but"
    try:
        numbers = numbers_in(json.loads(output.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise EvaluationError(
            f"{where} wrote no {output.name} to {{output}}.{_tail(log)}"
        ) from None
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{where} {{output}} is no JSON: {error}.{_tail(log)}") from None
    wanted = [*task.metrics, *([task.stderr] if task.stderr is not None else [])]
    for metric in wanted:
        if metric not in numbers:
            there = ", ".join(numbers) or "no finite numbers"
            raise EvaluationError(
                f"{where} its JSON has no finite number {metric!r}; it has {there}.{_tail(log)}"
            )
    stderr = None if task.stderr is None else numbers.pop(task.stderr)
    if stderr is not None and stderr < 0:
        raise EvaluationError(f"{where} its standard error {task.stderr} is {stderr:g}.")
    ordered = {metric: numbers[metric] for metric in task.metrics} | numbers
    return {
        metric: Score(
            value,
            stderr if metric in task.metrics else None,
            num_samples=1,
            unit="",
            higher_is_better=task.higher_is_better,
        )
        for metric, value in ordered.items()
    }


def numbers_in(value: Any, path: str = "") -> dict[str, float]:
    """Return the finite numbers of a JSON value by their dotted names; lists have none.

    Raises:
        ValueError: it is no mapping, or two numbers have one name.
    """
    if not isinstance(value, dict):
        raise ValueError(f"expected a mapping, found {type(value).__name__}")
    found: dict[str, float] = {}
    for key, item in value.items():
        name = f"{path}.{key}" if path else key
        new: dict[str, float] = {}
        if isinstance(item, dict):
            new = numbers_in(item, name)
        elif isinstance(item, (int, float)) and not isinstance(item, bool):
            with contextlib.suppress(OverflowError):
                new = {name: float(item)} if math.isfinite(float(item)) else {}
        if twice := found.keys() & new.keys():
            raise ValueError(f"{sorted(twice)[0]} is there twice")
        found |= new
    return found
