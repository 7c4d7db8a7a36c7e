"""A real SLURM on this machine: munged, slurmctld and one slurmd per node, all in one folder.

Needs Debian's ``slurm-wlm`` (any SLURM built with several slurmd per machine), and root, because
slurmd starts jobs as their users. It touches nothing outside of its folder and leaves no process.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from tests.support.megatron_lm import build_environment
from tests.support.run_distributed import REPOSITORY

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")

_SECONDS_BETWEEN_LOOKS = 10.0  # at what has failed

_CONFIG = """\
ClusterName=mergemix-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket
CredType=cred/munge
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool-%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd-%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0
MpiDefault=none
ReturnToService=2
KillWait=2
InactiveLimit=0
SwitchType=switch/none
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """Return what a cluster needs and this machine does not have."""
    missing = [name for name in PROGRAMS if _find(name) is None]
    return missing or ([] if os.geteuid() == 0 else ["root"])


class SlurmCluster:
    """A cluster of one or two nodes with ``cpus`` cores each, whatever the machine has.

    The nodes are called ``localhost`` and by the machine's name, so that both can be reached.
    As a context manager it starts, waits until every node is idle, and leaves nothing running. One
    runs at a time: jobs of two clusters have the same numbers, and so would choose the same ports.
    """

    def __init__(self, cpus: int = 4) -> None:
        """Prepare; ``cpus`` is what each node claims to have."""
        self._cpus = cpus
        self._daemons: list[subprocess.Popen[bytes]] = []

    @property
    def environment(self) -> dict[str, str]:
        """Return what a process needs to talk to this cluster and no other."""
        return {"SLURM_CONF": str(self.home / "slurm.conf")}

    def __enter__(self) -> SlurmCluster:
        self._turn = (Path(tempfile.gettempdir()) / "slurm-test-cluster.lock").open("w")
        fcntl.flock(self._turn, fcntl.LOCK_EX)
        # Sockets have short names, and munged refuses folders that others may write.
        self.home = Path(tempfile.mkdtemp(prefix="slurm-"))
        try:
            self._start()
        except BaseException:
            self._stop()
            self._turn.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()
        self._turn.close()

    def run(self, *words: str) -> str:
        """Return what one of SLURM's commands prints; its failure is an error."""
        done = subprocess.run(
            words, env=os.environ | self.environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def mergemix(self, config: Path, verb: str, *words: str) -> str:
        """Return what ``mergemix VERB`` prints in CPU mode, beside the YAML; it must succeed."""
        done = subprocess.run(
            [sys.executable, "-m", "megatron_mergemix", verb, str(config), *words],
            env=os.environ
            | {
                "MERGEMIX_DEVICE": "cpu",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(REPOSITORY),
                **build_environment(),
                **self.environment,
            },
            cwd=config.parent,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def status(self, config: Path) -> dict[str, dict[str, Any]]:
        """Return what ``mergemix status`` says about every piece, by its name."""
        rows = json.loads(self.mergemix(config, "status", "--json"))
        return {row["piece"]: row for row in rows}

    def wait_for(self, result: Path, config: Path, timeout: float) -> None:
        """Return when a file is there and the queue is empty; a piece that failed is an error."""
        looked = time.monotonic()

        def is_there() -> bool:
            nonlocal looked
            if not result.exists() and time.monotonic() - looked > _SECONDS_BETWEEN_LOOKS:
                failed = [row for row in self.status(config).values() if row["state"] == "failed"]
                assert not failed, f"{failed}\n{Path(failed[0]['log']).read_text()}"
                looked = time.monotonic()
            return result.exists()

        self.wait_until(is_there, timeout)
        self.wait_until(lambda: not self.run("squeue", "--noheader").strip())

    def start_requeued(self, job: str) -> None:
        """Wait until a job is queued again, and start it; SLURM would wait for two minutes."""
        self.wait_until(lambda: self.state(job) == "PENDING")
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def state(self, job: str) -> str:
        """Return the state of one job or array task, such as ``RUNNING``."""
        return self.run(
            "squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}"
        ).strip()

    def logs(self) -> str:
        """Return the end of every daemon's log."""
        ends = []
        for path in sorted(self.home.glob("*.log")):
            ends += [f"== {path.name}", *path.read_text(errors="replace").splitlines()[-12:]]
        return "\n".join(ends)

    def wait_until(self, happened: Callable[[], bool], timeout: float = 120.0) -> None:
        """Return as soon as ``happened()``; fail with the cluster's logs when it does not."""
        deadline = time.monotonic() + timeout
        while not happened():
            if time.monotonic() > deadline:
                raise AssertionError(f"it did not come to that\n{self.logs()}")
            time.sleep(0.1)  # asking SLURM starts a process, on cores that its jobs need

    def _start(self) -> None:
        for name in ("state", "spool-127.0.0.2", f"spool-{socket.gethostname()}"):
            (self.home / name).mkdir()
        self._start_munge()
        names = list(dict.fromkeys(["127.0.0.2", socket.gethostname()]))
        controller, *ports = _free_ports(1 + len(names))
        nodes = [
            f"NodeName={name} NodeAddr=127.0.0.1 Port={port} CPUs={self._cpus} Gres=gpu:2 "
            "State=UNKNOWN"
            for name, port in zip(names, ports, strict=True)
        ]
        (self.home / "slurm.conf").write_text(
            _CONFIG.format(
                host=socket.gethostname(),
                home=self.home,
                controller=controller,
                nodes="\n".join(nodes),
            )
        )
        self._write_gpus()
        self._daemon("slurmctld", "-D", "-i", "-f", str(self.home / "slurm.conf"))
        for name in names:
            self._daemon("slurmd", "-D", "-N", name, "-f", str(self.home / "slurm.conf"))
        self.wait_until(lambda: self._idle_nodes() == len(names), timeout=30)

    def _write_gpus(self) -> None:
        """Give each node two GPUs by name: files that no program opens."""
        for number in range(2):
            (self.home / f"gpu{number}").touch()
        (self.home / "gres.conf").write_text(f"Name=gpu File={self.home}/gpu[0-1]\n")

    def _start_munge(self) -> None:
        key = self.home / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {
            "key-file": "munge.key",
            "socket": "munge.socket",
            "pid-file": "munge.pid",
            "log-file": "munge.log",
            "seed-file": "munge.seed",
        }
        options = [f"--{option}={self.home / name}" for option, name in files.items()]
        self._daemon("munged", "--foreground", "--force", *options)
        deadline = time.monotonic() + 10
        while not (self.home / "munge.socket").exists():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.02)

    def _daemon(self, name: str, *options: str) -> None:
        program = _find(name)
        assert program is not None
        with (self.home / f"{name}-{len(self._daemons)}.out.log").open("wb") as output:
            self._daemons.append(
                subprocess.Popen(
                    [program, *options],
                    env=os.environ | self.environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def _idle_nodes(self) -> int:
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--format=%T"],
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
        )
        return done.stdout.split().count("idle")

    def _stop(self) -> None:
        """End the jobs, then the daemons, then whatever of theirs is left."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired, OSError):
            self.run("scancel", "--user=root", "--full", "--signal=KILL")
            self.run("scancel", "--user=root")
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(5)
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        for daemon in self._daemons:
            daemon.wait()
        shutil.rmtree(self.home, ignore_errors=True)

    def processes(self) -> Sequence[psutil.Process]:
        """Return every process of this cluster, daemons and jobs: they name its folder."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                words = " ".join(process.cmdline())
                if str(self.home) in words or (
                    process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]
                    and process.pid != os.getpid()
                ):
                    found.append(process)
        return found


def _find(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
