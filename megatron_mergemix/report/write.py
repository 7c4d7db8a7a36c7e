"""``mergemix report``: the page, and the same scalars and figures for TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_mergemix.files.publishing import publish_text
from megatron_mergemix.report.content import sections_of
from megatron_mergemix.report.drawing import check_installed
from megatron_mergemix.report.events import write_events
from megatron_mergemix.report.gather import read_run
from megatron_mergemix.report.page import html_page
from megatron_mergemix.report.summary import summary_of


def report(path: Path, overrides: Sequence[str], output: Path | None = None) -> None:
    """Write the page of an experiment and its TensorBoard folder.

    Args:
        path: the YAML file, or the run directory.
        overrides: ``"a.b.c=value"``; they matter as far as they name the run directory.
        output: the page; by default ``report.html`` in the run directory.

    Raises:
        ConfigError: matplotlib is missing.
        SearchError: there is no search to report.
    """
    check_installed()
    run = read_run(path, overrides)
    sections = sections_of(run)
    target = output or run.run_dir.report
    publish_text(target, html_page(summary_of(run), sections))
    for sentence in run.missing:
        print(f"missing: {sentence}")
    print(f"report:      {target}")
    try:
        write_events(run, sections)
    except OSError as error:  # such as a run directory of somebody else; the page may be elsewhere
        print(f"tensorboard: nothing is written, for its folder cannot be: {error}")
        return
    print(f"tensorboard: tensorboard --logdir {run.run_dir.root / 'tensorboard'}")
