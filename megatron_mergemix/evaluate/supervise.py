"""Runs one command in a session of its own, and ends it together with all that it has started.

``python -I -S supervise.py PARENT TIMEOUT GRACE WORDS...``: a process between the job and the
command, because only a living process can end others when the job is killed with -9. The command
writes to the standard error of this process; its own standard output says, as one line of JSON,
how the command ended. Nothing but the standard library: it starts in a few milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class _ToldToEnd(Exception):
    """The job wants the command to end, or is gone."""


def main(words: list[str]) -> None:
    """Run the command and say how it ended."""
    parent, timeout, grace = int(words[0]), float(words[1]), float(words[2])
    signal.signal(signal.SIGTERM, _raise)
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)  # whoever the command leaves behind becomes our child
    if os.getppid() != parent:  # it died before the call
        return
    print(json.dumps(run(words[3:], timeout, grace)), flush=True)


def run(words: list[str], timeout: float, grace: float) -> dict[str, Any]:
    """Return ``{"ended": ...}`` and ``"code"``, ``"signal"`` or ``"why"`` with it."""
    try:
        command = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            start_new_session=True,
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - there is one thread here
        )
    except OSError as error:
        return {"ended": "not started", "why": f"{words[0]}: {error.strerror}"}
    try:
        code = command.wait(timeout)
        ended = {"ended": "signal", "signal": -code} if code < 0 else {"ended": "exit"}
        return {**ended, "code": code}
    except subprocess.TimeoutExpired:
        return {"ended": "timeout"}
    except _ToldToEnd:
        return {"ended": "told to"}
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is being done
        _end(command, grace)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end(command: subprocess.Popen[bytes], grace: float) -> None:
    """Ask the command's group to end, and end everything that has not after ``grace`` seconds."""
    _signal_group(command.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while _children(command) and time.monotonic() < deadline:
        time.sleep(0.02)
    _signal_group(command.pid, signal.SIGKILL)
    while left := _children(command):  # the children of whoever dies become ours in turn
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _children(command: subprocess.Popen[bytes]) -> list[int]:
    """Return our children that live, and bury those that do not."""
    command.poll()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            continue
        if not entry.name.isdecimal() or int(fields[1]) != os.getpid():
            continue
        if fields[0] == "Z":
            with contextlib.suppress(ChildProcessError):
                os.waitpid(int(entry.name), os.WNOHANG)
        else:
            found.append(int(entry.name))
    return found


def _raise(number: int, frame: object) -> None:
    raise _ToldToEnd


if __name__ == "__main__":
    main(sys.argv[1:])
