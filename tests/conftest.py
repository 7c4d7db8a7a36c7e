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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count the tests that drive a real Megatron-LM: without a checkout they are all skipped."""
    counts = {
        outcome: sum("megatron_lm" in getattr(report, "keywords", ()) for report in found)
        for outcome, found in terminalreporter.stats.items()
        if outcome in ("passed", "failed", "error", "skipped")
    }
    if any(counts.values()):
        told = ", ".join(f"{number} {outcome}" for outcome, number in counts.items() if number)
        missing = counts.get("skipped", 0)
        terminalreporter.write_sep("=", f"tests of a real Megatron-LM: {told}", red=bool(missing))
