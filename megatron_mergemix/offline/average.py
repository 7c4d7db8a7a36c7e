"""``mergemix average``: the mean of the last saves of one run.

Saves of a run with a constant learning rate, averaged, stand in for its decay.

Source: WSM (arXiv 2507.17634): averaging saves with weights c_j weighs the gradients after save
j by the sum of the c of all later saves, as a learning-rate schedule would.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from megatron_mergemix.errors import CheckpointError, ConfigError
from megatron_mergemix.offline.options import add_shared_arguments, settings_of, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mergemix average``."""
    add = parser.add_argument
    add("run_root", metavar="RUN", type=Path, help="checkpoint root of one run")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--last", metavar="N", type=int, help="average the last N saves")
    which.add_argument(
        "--tokens", metavar="T", type=float, help="average the saves of the last T tokens"
    )
    add(
        "--weights",
        choices=("uniform", "linear", "minus-sqrt"),
        default="uniform",
        help="uniform: stands for a linear decay (default); linear: weights 1, 2, ..., newest "
        "heaviest; minus-sqrt: stands for a decay by 1 - sqrt, oldest heaviest",
    )
    add_shared_arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Average and publish.

    Raises:
        MergeMixError: there are not that many saves, or they cannot be averaged.
    """
    saves = _saves(options.run_root, options.last, options.tokens)
    weights = save_weights(options.weights, len(saves))
    from megatron_mergemix.merge.checkpoints import merge_checkpoints
    from megatron_mergemix.merge.methods import Recipe

    experts = {path.name: (path, w) for path, w in zip(saves, weights, strict=True)}
    origin = {"average": options.weights, "last": options.last, "tokens": options.tokens}
    recipe = Recipe("linear", ())
    settings = settings_of(options)
    show(merge_checkpoints(saves[-1], experts, recipe, options.output, settings, origin))


def save_weights(kind: str, count: int) -> list[float]:
    """Return the weights of ``count`` saves, oldest first; they sum to one.

    ``minus-sqrt``: gradients after save j of n weigh ``1 - sqrt(j / n)``.
    """
    if kind == "uniform":
        return [1 / count] * count
    if kind == "linear":
        return [2 * (j + 1) / (count * (count + 1)) for j in range(count)]
    return [math.sqrt((j + 1) / count) - math.sqrt(j / count) for j in range(count)]


def _saves(root: Path, last: int | None, tokens: float | None) -> list[Path]:
    from megatron_mergemix.checkpoint.opening import all_saves

    saves = all_saves(root)
    if tokens is not None:
        return _window(root, saves, tokens)
    assert last is not None
    if last < 1:
        raise ConfigError(f"--last is {last}, expected at least 1.")
    if len(saves) < last:
        have = ", ".join(path.name for _, path in saves) or "none"
        raise CheckpointError(f"{root} has {len(saves)} complete saves ({have}), not {last}.")
    return [path for _, path in saves[-last:]]


def _window(root: Path, saves: Sequence[tuple[int, Path]], tokens: float) -> list[Path]:
    """Return the saves less than ``tokens`` older than the newest."""
    if not tokens > 0:
        raise ConfigError(f"--tokens is {tokens:g}, expected more than 0.")
    if not saves:
        raise CheckpointError(f"{root} has no complete saves.")
    seen = [_tokens_seen(path) for _, path in saves]
    return [path for (_, path), count in zip(saves, seen, strict=True) if count > seen[-1] - tokens]


def _tokens_seen(folder: Path) -> float:
    from megatron_mergemix.checkpoint.common_state import arguments
    from megatron_mergemix.checkpoint.opening import common_of, open_checkpoint

    args = arguments(common_of(open_checkpoint(folder)))
    samples, length = args.get("consumed_train_samples"), args.get("seq_length")
    if type(samples) is not int or type(length) is not int:
        raise CheckpointError(
            f"{folder} does not tell how many tokens it was trained on. Use --last."
        )
    return float(samples * length)
