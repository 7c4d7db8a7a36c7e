"""One finished search that the tests of this room read."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mergemix.cli import main
from megatron_mergemix.report.gather import Run, read_run
from tests.support.searched import searched
from tests.support.validated import validated

DOMAINS = ("math", "code", "web")


@pytest.fixture(scope="package")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the ``mix.yaml`` of a finished search; tests that change it copy the folder."""
    return searched(tmp_path_factory.mktemp("finished"), DOMAINS)


@pytest.fixture(scope="package")
def run(finished: Path) -> Run:
    return read_run(finished)


@pytest.fixture(scope="package")
def page(finished: Path) -> str:
    """Return the page that the command wrote, beside TensorBoard's files."""
    assert main(["report", str(finished)]) == 0
    return (finished.parent / "run" / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="package")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the ``mix.yaml`` of a search with 27 references, their proxies and a diagnosis."""
    return validated(tmp_path_factory.mktemp("measured"), list(DOMAINS))
