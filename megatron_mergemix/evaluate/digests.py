"""What the scores of every capability depend on, and which of them count. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mergemix.config import Config
from megatron_mergemix.evaluate.command_digest import command_digest
from megatron_mergemix.evaluate.lm_eval_tasks import lm_eval_evaluator
from megatron_mergemix.evaluate.utility import objective_of
from megatron_mergemix.evaluate.windows import loss_digest
from megatron_mergemix.model_facts import model_facts


def capability_digests(config: Config) -> dict[str, str]:
    """Return ``evaluate.<capability>`` and what belongs to it -> text, in plain words.

    And ``search.first_share`` where it is below 1, because it decides on the order of items.

    Raises:
        DataError: a held-out dataset is missing.
        ConfigError: the model is not known yet, or a task of lm-eval cannot be found.
    """
    return dict(_digests(config))


def objective(config: Config) -> dict[str, tuple[str, ...]]:
    """Return which metrics of each capability enter the utility; loads the tasks of lm-eval.

    Raises:
        ConfigError: lm-eval is not installed, or a task is unknown or cannot be run here.
    """
    found = objective_of(config.evaluate)
    return found | (lm_eval_evaluator(config).objective if config.evaluate.lm_evals else {})


def _digests(config: Config) -> Iterator[tuple[str, str]]:
    length = model_facts(config).seq_length
    for name, capability in config.evaluate.capabilities.items():
        if capability.loss is not None:
            yield f"evaluate.{name}", loss_digest(capability.loss, length)
        if capability.command is not None:
            for part, text in command_digest(capability.command).items():
                yield f"evaluate.{name}{part}", text
    if config.evaluate.lm_evals:
        yield from lm_eval_evaluator(config).digest().items()
    if config.search.first_share < 1:
        yield "search.first_share", f"{config.search.first_share:g} of seed {config.search.seed}"
