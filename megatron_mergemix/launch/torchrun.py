"""Start a job's ranks on this machine with torchrun, and make its failure readable."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_mergemix.config import Config
from megatron_mergemix.distributed import die_with_parent
from megatron_mergemix.errors import MergeMixError
from megatron_mergemix.run_dir import RunDir

_TAIL_LINES = 15


def run_job(
    config: Config, config_path: Path, overrides: Sequence[str], job: str, names: Sequence[str] = ()
) -> None:
    """Run ``worker.py`` on ``parallel.processes`` ranks of this machine and wait for it.

    Progress comes through on standard output; warnings and tracebacks go to ``logs/<job>.log``.

    Raises:
        MergeMixError: the job failed; carries the message of the rank that failed first.
    """
    log = RunDir(config.run_dir).log(job)
    log.parent.mkdir(parents=True, exist_ok=True)
    error_file = log.with_suffix(".error")
    error_file.unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        f"--nproc-per-node={config.parallel.processes}",
        *("-m", "megatron_mergemix.worker", job, str(config_path), *names),
        *(f"--set={override}" for override in overrides),
        f"--error-file={error_file}",
    ]
    with log.open("ab") as stderr:
        process = subprocess.Popen(
            command, stderr=stderr, env=_environment(config), preexec_fn=die_with_parent
        )
        code = _wait(process)
    if code != 0:
        raise MergeMixError(_explain(job, code, error_file, log))
    error_file.unlink(missing_ok=True)


def _environment(config: Config) -> dict[str, str]:
    environment = dict(os.environ)
    threads = max(1, (os.cpu_count() or 1) // config.parallel.processes)
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron asks for it with TP
    # torchrun names ranks' threads and warns about defaults that are set on purpose here.
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    return environment


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Wait; on an interruption end the ranks first, so that none is left behind."""
    try:
        return process.wait()
    except BaseException:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
        raise


def _explain(job: str, code: int, error_file: Path, log: Path) -> str:
    if error_file.exists():
        return error_file.read_text(encoding="utf-8").strip()
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return (
        f"the {job} job ended with {how} and no message; start it again and it continues. "
        f"The end of {log}:\n" + "\n".join(tail)
    )
