"""Words that name models."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mergemix.errors import ConfigError
from megatron_mergemix.experiment.named_models import asked_of
from tests.support.untrained import with_experts, write_config


def test_a_word_that_names_no_kind_of_model_is_refused_with_those_there_are(tmp_path: Path) -> None:
    config = with_experts(write_config(tmp_path))
    for word in ("uniform", "math=0.3,code=0.7", "checkpoints:here"):
        with pytest.raises(ConfigError) as caught:
            asked_of(config, word)
        assert str(caught.value) == (
            f"--mergemix-model is '{word}', expected base, expert:NAME, mixture:..., alpha:... "
            "or checkpoint:FOLDER."
        )
    assert asked_of(config, "alpha:math=0.3,code=0.7").merge_weights == {"math": 0.3, "code": 0.7}
