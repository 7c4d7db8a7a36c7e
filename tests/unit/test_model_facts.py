"""What is known of the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mergemix.config import load_config
from megatron_mergemix.model_facts import vocab_size
from tests.support.untrained import write_config


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    return write_config(tmp_path)


def test_the_vocabulary_is_the_models_or_the_tokenizers(config_path: Path) -> None:
    assert vocab_size(load_config(config_path)) == 257
    assert vocab_size(load_config(config_path, ["model.vocab_size=300"])) == 300
