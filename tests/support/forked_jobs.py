"""Verbs of ``mergemix`` in this process, the ranks of their jobs forked.

A start of its own imports torch for the verb and for torchrun, and Megatron on every rank: sixteen
seconds of a core for two ranks, more than a tiny model takes to train. That real starts work is
held where starts are killed, continued, refused and queued.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

from megatron_mergemix.cli import main
from megatron_mergemix.config import Config
from megatron_mergemix.launch import verbs
from megatron_mergemix.run_dir import RunDir
from tests.support.run_distributed import run_distributed


def run_verb(config: Path, verb: str, *words: str) -> str:
    """Return what ``mergemix VERB CONFIG WORDS...`` prints; it must end well."""
    printed = io.StringIO()
    with forked_jobs(), contextlib.redirect_stdout(printed):
        code = main([verb, str(config), *words])
    assert code == 0, printed.getvalue()
    return printed.getvalue()


@contextlib.contextmanager
def forked_jobs() -> Iterator[None]:
    """Fork the ranks of jobs that are started in the block."""
    with mock.patch.object(verbs, "run_job", _run_job):
        yield


def _run_job(config: Config, job: str, names: Sequence[str] = (), *, quiet: bool = False) -> None:
    record = str(RunDir(config.run_dir).config)
    run_distributed(_work, config.parallel.processes, job, record, list(names), timeout=300)


def _work(job: str, record: str, names: list[str]) -> None:
    from megatron_mergemix.jobs.worker import run

    run(argparse.Namespace(job=job, config=record, names=names))
