"""What several rooms' tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.experiment import write_experiment
from tests.support.forked_jobs import run_verb


@pytest.fixture(scope="session")
def trained_experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the ``mix.yaml`` of a tiny experiment with base and experts trained under TP2."""
    path = write_experiment(tmp_path_factory.mktemp("trained"))
    run_verb(path, "train", "base", "experts")
    return path


SHARING = {
    "plugin": (
        *("test_plugin_in", "test_plugin_killed", "test_plugin_commands", "test_plugin_lm_eval"),
        *("test_plugin_patched", "test_plugin_validate", "test_patches"),
    ),
    "slurm": ("test_slurm",),
}
"""Group -> beginnings of the names of files that share a fixture of minutes, or a cluster."""

LONGEST = ("plugin", "slurm", "test_kill_and_resume", "test_command_search", "test_hierarchy")
"""Groups that are begun first, so that none of them is begun last."""


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a file's tests together in one process, and files together that share what is long."""

    def group_of(item: pytest.Item) -> str:
        name = item.path.stem
        shared = (g for g, starts in SHARING.items() if name.startswith(starts))
        return next(shared, str(item.path.relative_to(item.config.rootpath).with_suffix("")))

    def rank(item: pytest.Item) -> int:
        group = group_of(item).rpartition("/")[2]
        return LONGEST.index(group) if group in LONGEST else len(LONGEST)

    for item in items:
        item.add_marker(pytest.mark.xdist_group(group_of(item)))
    items.sort(key=rank)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count the tests that drive a real Megatron-LM: without a checkout they are all skipped."""
    counts = {
        outcome: sum("megatron_lm" in report.keywords for report in found)
        for outcome, found in terminalreporter.stats.items()
        if outcome in ("passed", "failed", "error", "skipped")
    }
    if any(counts.values()):
        told = ", ".join(f"{number} {outcome}" for outcome, number in counts.items() if number)
        missing = counts.get("skipped", 0)
        terminalreporter.write_sep("=", f"tests of a real Megatron-LM: {told}", red=bool(missing))
