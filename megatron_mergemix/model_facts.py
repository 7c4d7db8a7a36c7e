"""What an experiment stands on beside data and checkpoints: the model and how it is trained.

The built-in trainer reads it from the YAML. A Megatron-LM launch has it in its arguments; the
plugin puts it on record in ``run_dir/launch.json``, so that the other side knows it without torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_mergemix.config import Config, LaunchedModel
from megatron_mergemix.data.tokenizers import load_tokenizer
from megatron_mergemix.errors import ConfigError
from megatron_mergemix.run_dir import RunDir, publish_json


@dataclass(frozen=True)
class ModelFacts:
    """Model and training settings as plain JSON values.

    Attributes:
        seq_length: tokens per training sample and held-out window.
        global_batch_size: sequences per optimizer step.
        scoring: every setting that the scores of a checkpoint depend on, by name.
        training: every setting that the result of training depends on, by name.
    """

    seq_length: int
    global_batch_size: int
    scoring: Mapping[str, Any]
    training: Mapping[str, Any]

    def steps(self, tokens: float) -> int:
        """Return the optimizer steps that make at least ``tokens``."""
        return math.ceil(tokens / (self.global_batch_size * self.seq_length))


def model_facts(config: Config) -> ModelFacts:
    """Return the facts of an experiment.

    Raises:
        ConfigError: they come from a Megatron-LM launch that was not made yet.
    """
    if config.launch.kind == "builtin":
        return _of_sections(config)
    if config.launched is None:
        raise ConfigError(
            f"the model is not known yet ({RunDir(config.run_dir).launch} is missing): it comes "
            "from the arguments of pretrain_gpt.py. Run the expert stage first: add "
            "--mergemix-config mix.yaml --mergemix-stage expert --mergemix-expert DOMAIN to your "
            "launch."
        )
    return ModelFacts(**config.launched.model_dump())


def with_recorded_launch(config: Config) -> Config:
    """Return the settings with what earlier Megatron-LM launches put on record, if any did."""
    path = RunDir(config.run_dir).launch
    if config.launch.kind == "builtin" or not path.exists():
        return config
    recorded = LaunchedModel.model_validate_json(path.read_text(encoding="utf-8"))
    return config.model_copy(update={"launched": recorded})


def record_launch(config: Config) -> None:
    """Put what this launch says about the model on record, for the launching side."""
    assert config.launched is not None
    publish_json(RunDir(config.run_dir).launch, config.launched.model_dump(mode="json"))


def _of_sections(config: Config) -> ModelFacts:
    model, training = config.model, config.training.model_dump(mode="json")
    assert model is not None, "checked when the YAML was loaded"
    settings = model.model_dump(mode="json")
    del training["log_interval"]
    if model.num_moe_experts is None:
        del training["micro_batch_size"]  # only MoE balances its load within a micro-batch
    # The window length is part of what is evaluated; the others act in training alone.
    in_training_alone = ("seq_length", "init_std", "moe_aux_loss_coeff")
    return ModelFacts(
        seq_length=model.seq_length,
        global_batch_size=config.training.global_batch_size,
        scoring={name: settings[name] for name in settings if name not in in_training_alone},
        training={
            "model": settings,
            "training": training,
            "tokenizer": load_tokenizer(config.tokenizer).digest(),
        },
    )


def plain(value: Any) -> Any:
    """Return a setting as JSON would give it back."""
    return json.loads(json.dumps(value, sort_keys=True, default=str))
