"""The pieces of an experiment in the order of the work, and which of them are done."""

from __future__ import annotations

import json
from typing import Any

from megatron_mergemix.config import Config
from megatron_mergemix.experiment import search_record
from megatron_mergemix.model_facts import is_known
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.training_runs import experiment_runs
from megatron_mergemix.validation.references import is_measured


def pieces(config: Config, validate: bool = False) -> dict[str, list[str]]:
    """Return job -> pieces; a piece is done by one job or one task of an array.

    ``base``, ``experts/math``, ``search``, ``blend``, ``references/uniform`` and ``validation``;
    what is given as a checkpoint is no piece.
    """
    found = {"base": ["base"]} if config.base.train else {}
    if not config.experts.checkpoints:
        found["experts"] = [f"experts/{name}" for name in config.expert_names]
    found |= {"search": ["search"], "blend": ["blend"]}
    if not validate:
        return found
    references = [f"references/{name}" for name in config.references]
    return found | {"references": references, "validation": ["validation"]}


def is_done(config: Config, piece: str) -> bool:
    """Return whether a piece is done with these very settings.

    Nothing is before the first launch of Megatron-LM has told what the model is.

    Args:
        config: the experiment, with what launches of Megatron-LM put on record.
        piece: one of :func:`pieces`.

    Raises:
        MergeMixError: its place holds something else, or a file is damaged.
    """
    if not is_known(config):
        return False
    if piece == "base":
        return experiment_runs.requested_run(config, piece).is_finished()
    if config.base.train and not is_done(config, "base"):
        return False
    if piece.startswith("experts/"):
        return experiment_runs.requested_run(config, piece).is_finished()
    if not config.experts.checkpoints:
        experts = pieces(config)["experts"]
        if not all(is_done(config, name) for name in experts):
            return False
    result = search_record.search_result(config)
    if piece == "search" or result is None:
        return result is not None
    if piece == "blend":
        blend = search_record.learned_blend(config, result)
        return blend is not None and blend.get("train_tokens") == config.blend.train_tokens
    if piece.startswith("references/"):
        return is_measured(config, piece.removeprefix("references/"))
    return _compares_all(config, result)


def _compares_all(config: Config, result: dict[str, Any]) -> bool:
    """Return whether the comparison is of these very references, beside this very search."""
    path = RunDir(config.run_dir).validation
    if not path.exists():
        return False
    compared = json.loads(path.read_text())
    if not isinstance(compared, dict) or compared.get("digests") != result["digests"]:
        return False  # also one of an older version, which does not say whose it is
    names = [row["name"] for row in compared["references"]]
    return sorted(names) == sorted(config.references) and all(
        is_measured(config, name) for name in config.references
    )
