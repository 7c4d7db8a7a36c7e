"""A searched experiment of any size without a model: what candidates score is a formula."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_mergemix.config import Config, load_config
from megatron_mergemix.experiment.digests import search_digests, trial_digests
from megatron_mergemix.experiment.search_record import write_learned_blend
from megatron_mergemix.experiment.strategy import make_strategy, merge_weights_of
from megatron_mergemix.files.publishing import publish_json
from megatron_mergemix.mixtures.components import norm
from megatron_mergemix.run_dir import RunDir
from megatron_mergemix.search import held_out
from megatron_mergemix.search.journal import Journal
from megatron_mergemix.search.strategy import Strategy
from megatron_mergemix.trials import Score, Scores, Trial
from tests.support.tiny_dataset import write_dataset
from tests.support.untrained import BYTE, given

NUM_ITEMS = 40


def write_settings(
    home: Path,
    domains: Sequence[str],
    changes: Mapping[str, Any] | None = None,
    components: Mapping[str, Mapping[str, float]] | None = None,
) -> Path:
    """Write datasets, checkpoints of one tensor and ``mix.yaml``; return its path.

    Args:
        home: where everything goes.
        domains: names; a name ``group.leaf`` makes a domain with children. The n-th has
            ``1000 / n`` tokens.
        changes: sections that replace those of the settings.
        components: what experts are trained on, where it is not one domain each.
    """
    home.mkdir(parents=True, exist_ok=True)
    tree: dict[str, Any] = {}
    for place, name in enumerate(domains, 1):
        documents = np.split(np.arange(1000 // place // 10 * 10) % 250, 10)
        write_dataset(home / name, documents, BYTE)
        group, _, leaf = name.partition(".")
        leaf_settings = {"prefixes": [str(home / name)]}
        if leaf:
            tree.setdefault(group, {"children": {}})["children"][leaf] = leaf_settings
        else:
            tree[group] = leaf_settings
        held_out_documents = np.split(np.arange(400) % 250, 10)
        write_dataset(home / f"{name}_heldout", held_out_documents, BYTE)
    names = [name.rpartition(".")[2] for name in domains]
    path = home / "mix.yaml"
    wanted = enumerate(components or names)
    experts = {name: str(given(path, name, 2.0 + place)) for place, name in wanted}
    settings = {
        "run_dir": str(home / "run"),
        "model": {
            "num_layers": 1,
            "hidden_size": 8,
            "num_attention_heads": 2,
            "seq_length": 8,
            "make_vocab_size_divisible_by": 8,
        },
        "base": {"checkpoint": str(given(path, "base", 1.0))},
        "domains": tree,
        "experts": {
            "tokens": 330,
            "checkpoints": experts,
            **({"components": dict(components)} if components else {}),
        },
        "evaluate": {
            "capabilities": {
                f"{name}-text": {
                    "loss": {"prefixes": [str(home / f"{prefix}_heldout")], "sequences": 20}
                }
                for name, prefix in zip(names, domains, strict=True)
            }
        },
        "search": {"trials": 14},
        "blend": {"split": "1,0,0", "train_tokens": 1000},
        **(changes or {}),
    }
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def scores_of_mixture(
    config: Config,
    mixture: Mapping[str, float],
    seed: int,
    luck: float = 0.01,
    first: float | None = None,
) -> Scores:
    """Return losses that fall with the share of their own domain, ever more slowly.

    Items are the same for every seed; ``luck`` is the noise of one candidate on top. With ``first``
    only that share of them is scored.
    """
    found = {}
    for place, (domain, name) in enumerate(
        zip(config.domains, config.evaluate.capabilities, strict=True)
    ):
        share = mixture.get(domain, 0.0)
        items = 3 - (1 + place / 5) * np.sqrt(share + 0.01)
        items = items + np.random.default_rng(place).normal(0, 0.2, NUM_ITEMS)
        items = items + np.random.default_rng([seed, place]).normal(0, 5 * luck, NUM_ITEMS)
        items = items[: round(NUM_ITEMS * (first or 1))]
        error = float(items.std(ddof=1) / np.sqrt(len(items)))
        score = Score(
            float(items.mean()), error, len(items), "nats/token", False, tuple(items.tolist())
        )
        found[name] = {"loss": score}
    return found


def run_trials(config: Config, stop_after: int | None = None, luck: float = 0.01) -> Strategy:
    """Write the journal of a search, or of its first trials; return the strategy that saw it."""
    run_dir = RunDir(config.run_dir)
    publish_json(run_dir.config, config.model_dump(mode="json"))
    journal, strategy = Journal(run_dir.trials, trial_digests(config)), make_strategy(config)
    while asked := strategy.ask():
        for each in asked:
            if stop_after is not None and len(journal.trials()) >= stop_after:
                return strategy
            journal.append(
                Trial(
                    each.index,
                    each.purpose,
                    dict(each.mixture),
                    dict(merge_weights_of(config)(each.mixture)),
                    scores_of_mixture(config, each.mixture, each.index, luck, each.first),
                    first=each.first,
                    seconds={"merge": 0.25, "evaluate": 1.5},
                )
            )
        strategy.tell(journal.trials())
    return strategy


def finish(config: Config, luck: float = 0.01) -> dict[str, Any]:
    """Write journal, result and blend of a whole search; return the result."""
    strategy = run_trials(config, luck=luck)
    run_dir = RunDir(config.run_dir)
    trials = Journal(run_dir.trials, trial_digests(config)).trials()
    advice = strategy.recommend()
    assert is_dataclass(advice)
    alpha = dict(merge_weights_of(config)(advice.mixture))
    count = len(config.expert_names)
    angles = np.eye(count) + 0.3 * (1 - np.eye(count))
    result = {
        **asdict(advice),
        "merge_weights": alpha,
        "merge_weights_norm": norm(alpha.values()),
        "trials": len(trials),
        "held_out": held_out_of(config, trials, advice),
        "task_vector_products": (4 * angles).tolist(),
        "digests": search_digests(config),
        "version": "0",
        "seconds": 12.5,
    }
    publish_json(run_dir.result, result)
    write_learned_blend(config, result)
    return dict(json.loads(run_dir.result.read_text()))


def held_out_of(config: Config, trials: Sequence[Trial], advice: Any) -> dict[str, Any]:
    """Return the comparison on new items, which score as the others do."""
    from megatron_mergemix.evaluate.digests import objective
    from megatron_mergemix.evaluate.utility import Utility
    from megatron_mergemix.search.calibration import utility_scale

    utility = Utility(config.evaluate.utility, objective(config))
    compared = held_out.compared(advice, trials)
    new = {t.index: scores_of_mixture(config, t.mixture, 100) for t in compared.values()}
    scale = utility_scale(utility, trials)
    return held_out.comparison(config.evaluate, utility, scale, compared, new)


def searched(
    home: Path,
    domains: Sequence[str],
    changes: Mapping[str, Any] | None = None,
    components: Mapping[str, Mapping[str, float]] | None = None,
) -> Path:
    """Return the ``mix.yaml`` of a finished search; arguments as those of its settings."""
    path = write_settings(home, domains, changes, components)
    finish(load_config(path))
    return path
