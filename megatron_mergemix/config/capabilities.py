"""Rules that join settings of the section ``evaluate`` with each other and with the search."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_mergemix.config.evaluate import KINDS, CommandTask
from megatron_mergemix.config.mixtures import known_keys
from megatron_mergemix.config.problems import KeyPath, Problem, shown
from megatron_mergemix.config.words import word_problems

if TYPE_CHECKING:
    from megatron_mergemix.config import Config

PLACEHOLDERS = ("{checkpoint}", "{output}")
_BRACED = re.compile(r"\{\w+\}")


def capability_problems(config: Config) -> Iterator[Problem]:
    """Return every rule that the capabilities and their utility break."""
    for name, capability in config.evaluate.capabilities.items():
        path: KeyPath = ("evaluate", "capabilities", name)
        if len(capability.kinds) != 1:
            found = " and ".join(capability.kinds) or "none of them"
            yield Problem(path, f"has {found}, expected exactly one of {', '.join(KINDS)}")
        if capability.lm_eval is not None and not capability.lm_eval.tasks:
            yield Problem((*path, "lm_eval", "tasks"), "is empty, expected at least one task")
        if capability.command is not None:
            yield from _command((*path, "command"), capability.command)
    yield from _weights(config)
    yield from _needs_losses(config)
    yield from _for_commands(config)


def _weights(config: Config) -> Iterator[Problem]:
    weights = config.evaluate.utility.weights
    where: KeyPath = ("evaluate", "utility", "weights")
    yield from known_keys(where, weights, config.evaluate.capabilities, "capability")
    if not weights:
        return
    if missing := [name for name in config.evaluate.capabilities if name not in weights]:
        yield Problem(
            where,
            f"has none for {', '.join(missing)}, expected one for every capability (0 leaves it "
            "out)",
        )
    if not any(weights.values()):
        yield Problem(where, "are all 0, expected at least one greater than 0")
    if config.evaluate.utility.kind == "worst" and not {0.0, 1.0}.issuperset(weights.values()):
        yield Problem(
            where,
            "has others than 0 and 1, which evaluate.utility.kind: worst cannot use: the worst "
            "capability decides alone. Use kind: mean, or weights 0 and 1",
        )


def _command(path: KeyPath, task: CommandTask) -> Iterator[Problem]:
    yield from word_problems((*path, "run"), task.run, of="command")
    for wanted in PLACEHOLDERS if task.run else ():
        if not any(wanted in word for word in task.run):
            braced = [found for word in task.run for found in _BRACED.findall(word)]
            near = difflib.get_close_matches(wanted, set(braced) - set(PLACEHOLDERS), n=1)
            hint = f"; {near[0]} is not replaced by anything" if near else ""
            yield Problem((*path, "run"), f"has no {wanted}, which the program needs{hint}")
    if not task.metrics:
        yield Problem((*path, "metrics"), "is empty, expected at least one number of the JSON")
    if len(set(task.metrics)) < len(task.metrics):
        yield Problem((*path, "metrics"), "has a metric twice")
    if task.stderr in task.metrics:
        yield Problem((*path, "stderr"), f"is {shown(task.stderr)}, which is the metric itself")
    if task.stderr is not None and len(task.metrics) > 1:
        yield Problem(
            (*path, "stderr"),
            f"is {shown(task.stderr)}, but there are {len(task.metrics)} metrics; it is the "
            "standard error of a single one. Leave it away, or make capabilities of the metrics",
        )


def _needs_losses(config: Config) -> Iterator[Problem]:
    """Find capabilities that count and that a search by probabilities of tokens cannot use."""
    evaluate, search = config.evaluate, config.search
    users = {"strategy": search.strategy == "gradient", "ensemble": search.ensemble}
    counted = [n for n in evaluate.capabilities if evaluate.utility.counts(n)]
    others = [name for name in counted if evaluate.capabilities[name].loss is None]
    for key, is_used in users.items():
        if is_used and others:
            yield Problem(
                ("search", key),
                f"is {shown(getattr(search, key))}, which needs held-out losses, but "
                f"{', '.join(others)} {'is' if len(others) == 1 else 'are'} none; give "
                f"{'it' if len(others) == 1 else 'them'} a loss, or the weight 0 in "
                "evaluate.utility.weights, or leave the setting away",
            )


def _for_commands(config: Config) -> Iterator[Problem]:
    evaluate = config.evaluate
    if evaluate.scratch is not None and str(evaluate.scratch).startswith("~"):
        yield Problem(
            ("evaluate", "scratch"),
            f"is {shown(str(evaluate.scratch))}, expected a whole path: ~ is not expanded",
        )
    if not evaluate.commands:
        for key in ("commands_at_once", "scratch"):
            if getattr(evaluate, key) != type(evaluate).model_fields[key].default:
                yield Problem(
                    ("evaluate", key),
                    "is given, but no capability is a command; leave it away",
                )
    elif config.search.replicas == "candidates":
        yield Problem(
            ("search", "replicas"),
            "is candidates, but commands score one candidate at a time "
            f"({', '.join(evaluate.commands)}); use auto or requests",
        )
