"""What an experiment stands on beside data and checkpoints: the model and how it is trained.

The built-in trainer reads it from the YAML. A Megatron-LM launch has it in its arguments; the
plugin puts it on record in ``run_dir/launch.json``, so that the other side knows it without torch.
"""

from __future__ import annotations

import json
from typing import Any

from megatron_mergemix.config import Config, Model, ModelFacts
from megatron_mergemix.data.tokenizers import load_tokenizer
from megatron_mergemix.errors import ConfigError
from megatron_mergemix.files.publishing import publish_json
from megatron_mergemix.run_dir import RunDir


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
    return config.launched


def is_known(config: Config) -> bool:
    """Return whether there are facts; before the first launch of Megatron-LM there are none."""
    return config.launch.kind == "builtin" or config.launched is not None


def training_settings(config: Config) -> dict[str, Any]:
    """Return every setting that the result of training depends on; loads the tokenizer."""
    settings = dict(model_facts(config).training)
    if config.launch.kind == "builtin":  # a launch names its tokenizer among its arguments
        settings["tokenizer"] = load_tokenizer(config.tokenizer).digest()
    return settings


def vocab_size(config: Config) -> int:
    """Return the vocabulary size before padding: the model section's, else the tokenizer's."""
    model: Model | None = config.model
    if model is not None and model.vocab_size is not None:
        return model.vocab_size
    return load_tokenizer(config.tokenizer).vocab_size


def with_recorded_launch(config: Config) -> Config:
    """Return the settings with what earlier Megatron-LM launches put on record, if any did."""
    path = RunDir(config.run_dir).launch
    if config.launch.kind == "builtin" or not path.exists():
        return config
    recorded = ModelFacts.model_validate_json(path.read_text(encoding="utf-8"))
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
        training={"model": settings, "training": training},
    )


def as_json(value: Any) -> Any:
    """Return a setting as JSON would give it back."""
    return json.loads(json.dumps(value, sort_keys=True, default=str))
