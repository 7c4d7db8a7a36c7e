"""What makes an evaluator refuse an experiment before anything is scored."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mergemix.config import load_config
from megatron_mergemix.errors import ConfigError
from megatron_mergemix.evaluate.make import make_evaluator
from tests.support import lm_eval_tasks
from tests.support.untrained import write_config


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(tmp_path: Path) -> None:
    task = lm_eval_tasks.write(tmp_path / "tasks")[0]
    quiz = {"evaluate": {"capabilities": {"quiz": {"lm_eval": {"tasks": [task]}}}}}
    config = load_config(write_config(tmp_path, quiz), ["model.seq_length=64"])
    make_evaluator(config, 257)
    with pytest.raises(ConfigError, match="has 257 ids, but the model's vocabulary has 256 rows"):
        make_evaluator(config, 256)
