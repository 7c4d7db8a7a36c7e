"""What a configuration is refused with."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mergemix.config import load_config
from megatron_mergemix.errors import ConfigError


def refusal(path: Path, *overrides: str) -> str:
    """Return the message with which loading ``path`` is refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)
