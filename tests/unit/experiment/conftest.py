"""An experiment whose experts can be given."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.untrained import (
    write_config,
)


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    return write_config(tmp_path)
