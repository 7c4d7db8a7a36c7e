"""Start a job's ranks on this machine, several with torchrun, and make a failure readable."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_mergemix.config import Config
from megatron_mergemix.errors import MergeMixError
from megatron_mergemix.processes.process_life import die_with_parent, without_torchrun
from megatron_mergemix.run_dir import RunDir

STDERR = 2
"""File descriptor of standard error."""

_TAIL_LINES = 15

# What torchrun writes when a rank died without a word; a negative exit code is a signal.
_ROOT_CAUSE = re.compile(r"Root Cause.*?rank +: (\d+).*?exitcode +: -(\d+)", re.DOTALL)

# What torchrun would tell a rank that is alone; at port 0 it finds a free one by itself.
_ALONE = {
    **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
    **{"MASTER_ADDR": "localhost", "MASTER_PORT": "0"},
}


def run_job(config: Config, job: str, names: Sequence[str] = (), *, quiet: bool = False) -> None:
    """Run ``jobs/worker.py`` on ``parallel.processes`` ranks of this machine and wait for it.

    The ranks read the settings on record in ``run_dir/config.json``, because the user may be
    editing the YAML already.

    Progress comes through on standard output, or where that is for something else (``quiet``) on
    standard error; warnings and tracebacks go to ``logs/<job>.log``.

    Raises:
        MergeMixError: the job failed; carries the message of the rank that failed first.
    """
    log = RunDir(config.run_dir).log(job)
    log.parent.mkdir(parents=True, exist_ok=True)
    error_file = log.with_suffix(".error")
    error_file.unlink(missing_ok=True)
    command = [
        *(sys.executable, *_torchrun(config.parallel.processes)),
        *("-m", "megatron_mergemix.jobs.worker", job, str(RunDir(config.run_dir).config), *names),
        f"--error-file={error_file}",
    ]
    with log.open("ab") as stderr:
        log_start = stderr.tell()
        process = subprocess.Popen(
            command,
            stdout=STDERR if quiet else None,
            stderr=stderr,
            env=_environment(config),
            preexec_fn=die_with_parent,
        )
        code = wait_for(process)
    if code != 0:
        alone = config.parallel.processes == 1
        raise MergeMixError(_explain(job, code, error_file, log, log_start, alone))
    error_file.unlink(missing_ok=True)


def _torchrun(processes: int) -> list[str]:
    """Return the words that start the ranks; none for one rank, which saves torchrun's seconds."""
    if processes == 1:
        return []
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]


def _environment(config: Config) -> dict[str, str]:
    environment = dict(os.environ)
    if config.parallel.processes == 1:
        environment = without_torchrun(environment) | _ALONE
    threads = max(1, (os.cpu_count() or 1) // config.parallel.processes)
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron asks for it with TP
    # torchrun names ranks' threads and warns about defaults that are set on purpose here.
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    return environment


def wait_for(process: subprocess.Popen[bytes]) -> int:
    """Wait; on an interruption end the ranks first, so that none is left behind.

    A SIGTERM is handed on, and waited for: a launch may save before it goes.
    """
    with _handing_on_sigterm(process) as was_told:
        try:
            code = process.wait()
        except BaseException:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    if was_told:
        raise SystemExit(128 + signal.SIGTERM)
    return code


@contextlib.contextmanager
def _handing_on_sigterm(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Send a SIGTERM of ours to a process; give a list that gets one entry for each."""
    told: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield told  # which alone may handle signals
        return

    def hand_on(number: int, frame: object) -> None:
        told.append(number)
        process.send_signal(number)

    before = signal.signal(signal.SIGTERM, hand_on)
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)


def _explain(job: str, code: int, error_file: Path, log: Path, log_start: int, alone: bool) -> str:
    """Return why a job failed; ``log_start`` is where its part of the log begins."""
    if error_file.exists():
        return error_file.read_text(encoding="utf-8").strip()
    written = log.read_bytes()[log_start:].decode(errors="replace")
    again = "Start it again and it continues."
    if killed := _killed_rank(code, written, alone):
        rank, number = killed
        memory = " The kernel does that when memory runs out: see `dmesg`." if number == 9 else ""
        return (
            f"rank {rank} of the {job} job was killed by {_signal_name(number)}.{memory} {again} "
            f"Its output is in {log}."
        )
    how = describe_exit(code)
    tail = "\n".join(written.splitlines()[-_TAIL_LINES:])
    return f"the {job} job ended with {how} and no message. {again} The end of {log}:\n{tail}"


def _killed_rank(code: int, written: str, alone: bool) -> tuple[int, int] | None:
    """Return the rank that a signal killed first, and the signal; ``code`` is torchrun's or its."""
    if alone:
        return (0, -code) if code < 0 else None
    found = _ROOT_CAUSE.search(written)
    return (int(found[1]), int(found[2])) if found else None


def describe_exit(code: int) -> str:
    """Return what an exit code of ``subprocess`` says."""
    return _signal_name(-code) if code < 0 else f"exit code {code}"


def _signal_name(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"
