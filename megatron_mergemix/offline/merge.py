"""``mergemix merge``: experts and weights from the command line, a mix.yaml or its search."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mergemix.errors import ConfigError, SearchError
from megatron_mergemix.offline.options import add_shared_arguments, settings_of, show

if TYPE_CHECKING:
    from megatron_mergemix.merge.methods import Recipe

Experts = dict[str, tuple[Path, float]]

SUM_TO_ONE = ("linear", "slerp")
NOT_NEGATIVE = ("ties", "slerp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mergemix merge``."""
    add = parser.add_argument
    add("--base", metavar="PATH", type=Path, help="checkpoint that the experts started from")
    add(
        "--expert",
        dest="experts",
        metavar="PATH=WEIGHT",
        action="append",
        type=_expert,
        default=[],
        help="checkpoint root or iteration folder, and its weight; repeat it",
    )
    add("--config", metavar="mix.yaml", type=Path, help="take base and experts of an experiment")
    add(
        "--alpha",
        metavar="EXPERT=WEIGHT",
        action="extend",
        nargs="+",
        type=_weight,
        help="with --config: merge weights; an expert left out weighs 0",
    )
    add(
        "--from-search",
        action="store_true",
        help="with --config: the merge weights that its search recommends",
    )
    add(
        "--method",
        choices=("linear", "task_arithmetic", "ties", "dare", "slerp"),
        default="linear",
        help="default: linear",
    )
    add(
        "--scale",
        metavar="LAMBDA",
        type=_number,
        default=1.0,
        help="factor on the merged task vector: task_arithmetic, ties, dare (default: 1)",
    )
    add(
        "--density",
        metavar="SHARE",
        type=_number,
        help="share of each task vector that is kept; for ties (default: 0.2) and dare (0.5)",
    )
    add("--seed", type=int, default=0, help="of the masks of dare (default: 0)")
    add(
        "--vocab-size",
        metavar="TOKENS",
        type=int,
        help="allow different numbers of padded vocabulary rows: rows from this one on are padding"
        " and taken from the base",
    )
    add_shared_arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Merge and publish.

    Raises:
        MergeMixError: the arguments contradict each other, or the merge cannot be done.
    """
    base, experts, origin = _inputs(options)
    recipe = _recipe(options, experts)
    from megatron_mergemix.merge.checkpoints import merge_checkpoints

    show(merge_checkpoints(base, experts, recipe, options.output, settings_of(options), origin))


def _inputs(options: argparse.Namespace) -> tuple[Path, Experts, dict[str, Any]]:
    if options.config is None:
        if options.base is None or not options.experts:
            raise ConfigError("name --base and at least one --expert PATH=WEIGHT, or --config.")
        if options.alpha or options.from_search:
            raise ConfigError("--alpha and --from-search need --config; or use --expert.")
        return options.base, _named(options.experts), {}
    if options.base is not None or options.experts:
        raise ConfigError("--config names base and experts; drop --base and --expert.")
    if bool(options.alpha) == options.from_search:
        raise ConfigError("--config needs one of --alpha EXPERT=WEIGHT ... and --from-search.")
    return _from_config(options.config, options.alpha)


def _from_config(path: Path, alpha: Sequence[tuple[str, float]] | None) -> Any:
    from megatron_mergemix.config import load_config
    from megatron_mergemix.model_facts import with_recorded_launch
    from megatron_mergemix.run_dir import RunDir
    from megatron_mergemix.training_runs.experiment_runs import base_checkpoint, expert_checkpoints

    config = with_recorded_launch(load_config(path))
    names = config.expert_names
    origin: dict[str, Any] = {"config": str(path)}
    if alpha is not None:
        weights = dict(alpha)
        if len(weights) < len(alpha):
            twice = next(name for name in weights if sum(name == each for each, _ in alpha) > 1)
            raise ConfigError(f"--alpha: {twice!r} is there twice; give it one weight.")
        if unknown := [name for name in weights if name not in names]:
            raise ConfigError(f"--alpha: {unknown[0]!r} is no expert: {', '.join(names)}.")
    else:
        result = RunDir(config.run_dir).result
        if not result.is_file():
            raise SearchError(f"{result} does not exist. Run `mergemix search {path}` first.")
        found = json.loads(result.read_text())
        weights = found["merge_weights"]
        origin |= {"mixture": found["mixture"], "search": str(result)}
        _check_digests(config, found, result)
    checkpoints = expert_checkpoints(config)
    experts = {name: (checkpoints[name], float(weights.get(name, 0.0))) for name in names}
    return base_checkpoint(config), experts, origin


def _check_digests(config: Any, found: Mapping[str, Any], result: Path) -> None:
    """Check that the search measured the checkpoints that are about to be merged."""
    from megatron_mergemix.experiment.digests import checkpoint_digests

    now = checkpoint_digests(config)
    if others := [name for name, digest in now.items() if found["digests"].get(name) != digest]:
        raise SearchError(
            f"{result} was measured on another {' and another '.join(others)} than the "
            "settings name now. Search again, or name the merge weights with --alpha."
        )


def _recipe(options: argparse.Namespace, experts: Experts) -> Recipe:
    method, weights = options.method, [weight for _, weight in experts.values()]
    if method in SUM_TO_ONE and abs(sum(weights) - 1) > 1e-6:
        raise ConfigError(
            f"the weights sum to {sum(weights):.6g}; {method} expects 1. "
            "--method task_arithmetic takes any weights and adds to the base."
        )
    if method in NOT_NEGATIVE and min(weights) < 0:
        raise ConfigError(f"a weight is {min(weights):.6g}; {method} expects none below 0.")
    if method in NOT_NEGATIVE and not any(weights):
        raise ConfigError(f"all weights are 0; {method} needs one above.")
    if method in SUM_TO_ONE and options.scale != 1.0:
        raise ConfigError(f"--scale is not for {method}; use --method task_arithmetic.")
    if options.density is not None and method not in ("ties", "dare"):
        raise ConfigError(f"--density is not for {method}, only for ties and dare.")
    density = {"ties": 0.2, "dare": 0.5}.get(method, 1.0)
    density = density if options.density is None else options.density
    if not 0 < density <= 1:
        raise ConfigError(f"--density is {density:.6g}, expected more than 0 and at most 1.")
    from megatron_mergemix.merge.methods import Recipe

    return Recipe(method, (), options.scale, density, options.seed)


def _named(pairs: Sequence[tuple[Path, float]]) -> Experts:
    """Name experts by the last parts of their paths, as many as tell them apart."""
    parts = [path.resolve().parts for path, _ in pairs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return dict(zip(names, pairs, strict=True))
    raise ConfigError("the same --expert is named twice; add up its weights.")


def _expert(text: str) -> tuple[Path, float]:
    path, equals, weight = text.rpartition("=")
    if not path or not equals:
        raise argparse.ArgumentTypeError(f"{text!r}, expected PATH=WEIGHT")
    return Path(path), _number(weight)


def _weight(text: str) -> tuple[str, float]:
    name, equals, weight = text.rpartition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r}, expected EXPERT=WEIGHT")
    return name, _number(weight)


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r}, expected a finite number")
    return number
