"""Launch a module on ranks, as torchrun would, forked from a process that has Megatron-LM imported.

    done = run_forked("megatron_mergemix.launch", 2, ["pretrain_gpt.py", "--seed", "1"], checkout=c)

Torch takes four seconds of a core to import and Megatron-LM five, more than a tiny model takes to
train, and torchrun imports torch once more. This module is the process, too: ``python -m`` it, and
every line that it reads is the folder of a launch.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import inspect
import itertools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from argparse import ArgumentParser
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.support.run_distributed import RankFailure, environment

# Below those that the kernel gives to whoever asks for any, and other ones for every worker of
# pytest, so that nobody takes one before its rank does.
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 10
_PORTS = itertools.cycle(range(20000 + 1000 * _WORKER, 21000 + 1000 * _WORKER))


def run_forked(
    module: str,
    nproc: int,
    args: Iterable[str] = (),
    env: Mapping[str, str] | None = None,
    timeout: float = 180.0,
    checkout: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a module as ``torchrun --nproc-per-node NPROC -m MODULE ARGS...`` in CPU mode.

    A Megatron-LM checkout is imported before, once for all its launches, with CPU mode active;
    without one that is the module's own task.

    Returns an exit code (0, or 1 when a rank failed) and everything written, stderr merged into
    stdout. A run that takes longer than ``timeout`` seconds is killed with all it started and
    raises :class:`RankFailure`.
    """
    words = [module, *args]
    with tempfile.TemporaryDirectory(prefix="launch-") as folder:
        home = Path(folder)
        (home / "output").touch()
        job = {
            "words": words,
            "nproc": nproc,
            "env": environment() | dict(env or {}) | _rendezvous(),
            "cwd": os.getcwd(),
        }
        (home / "job").write_text(json.dumps(job))
        server = _server(checkout)
        assert server.stdin is not None
        server.stdin.write(f"{home}\n")
        server.stdin.flush()
        deadline = time.monotonic() + timeout
        while not (home / "code").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        in_time = (home / "code").exists()
        if (home / "keeper").exists():
            _kill_group(int((home / "keeper").read_text()))
        output = (home / "output").read_text(errors="replace")
        if not in_time:
            raise RankFailure(f"No end after {timeout} s: {words}\n{output}")
        return subprocess.CompletedProcess(words, int((home / "code").read_text()), output, "")


def _rendezvous() -> dict[str, str]:
    for port in _PORTS:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    raise AssertionError("ports do not end")


@functools.cache
def _server(checkout: Path | None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.support.forked_launch"]
    if checkout is not None:
        command.append(str(checkout))
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    )
    atexit.register(server.kill)
    return server


def _kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


# ---- in the process that has the modules imported ----


def _serve(checkout: str | None) -> None:
    """Fork a keeper for every launch, until nobody can ask for one any more."""
    import torch
    import torch._dynamo  # noqa: F401  what CPU mode imports before it wraps torch

    if checkout is not None:
        _import_megatron(checkout)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for keepers
    while line := sys.stdin.readline():
        if os.fork() == 0:
            _keep(Path(line.strip()))
            return


def _import_megatron(checkout: str) -> None:
    """Import what every launch needs, and do what each of them would do anew."""
    from megatron_mergemix.megatron import cpu_mode

    before = dict(os.environ)
    cpu_mode.activate()
    sys.path.insert(0, checkout)
    for module in ("pretrain_gpt", "megatron.core.tokenizers.text"):
        importlib.import_module(module)
    # Every parser reads the sources of the classes that it makes flags of: a second, three times.
    inspect.getsource = functools.cache(inspect.getsource)
    importlib.import_module("megatron.training.arguments").add_megatron_arguments(ArgumentParser())
    sys.path.remove(checkout)
    _ADDED.update({name: os.environ[name] for name in os.environ.keys() - before.keys()})


def _keep(home: Path) -> None:
    """Fork the ranks of one launch, and write down how they ended; a rank returns from here."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _publish(home / "keeper", str(os.getpid()))
    job = json.loads((home / "job").read_text())
    ranks = set()
    for rank in range(job["nproc"]):
        pid = os.fork()
        if pid == 0:
            _be(rank, job, home / "output")
            return
        ranks.add(pid)
    failed = False
    while ranks:
        pid, status = os.wait()
        ranks.discard(pid)
        if status != 0 and not failed:
            failed = True
            for other in ranks:  # they may wait for the one that failed
                os.kill(other, signal.SIGTERM)
    _publish(home / "code", str(int(failed)))
    os._exit(0)


def _be(rank: int, job: Mapping[str, Any], output: Path) -> None:
    """Run the module, in what looks like a process of its own."""
    number, world_size = str(rank), str(job["nproc"])
    ranks = {"RANK": number, "LOCAL_RANK": number}
    world = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.clear()
    os.environ |= {**_ADDED, **job["env"], **ranks, **world}
    os.chdir(job["cwd"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    written = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(written, 1)
    os.dup2(written, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if job["env"].get("PYTHONWARNINGS") == "ignore":
        warnings.simplefilter("ignore")
    module, *args = job["words"]
    sys.argv = [module, *args]
    sys.path[:] = [job["cwd"], *job["env"]["PYTHONPATH"].split(os.pathsep), *_INSTALLED]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _publish(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.rename(path)


if __name__ == "__main__":
    _GIVEN = {os.getcwd(), *os.environ["PYTHONPATH"].split(os.pathsep)}
    _INSTALLED = [folder for folder in sys.path if folder not in _GIVEN]
    _ADDED: dict[str, str] = {}  # to the environment, by what was imported
    _serve(*sys.argv[1:] or [None])
