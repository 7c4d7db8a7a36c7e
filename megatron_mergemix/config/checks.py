"""Rules that join several settings. No file is opened here."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from megatron_mergemix.config.capabilities import capability_problems
from megatron_mergemix.config.groups import domain_path, group_problems
from megatron_mergemix.config.layout import BYTE_VOCAB, layout_problems
from megatron_mergemix.config.mixtures import SUM_TOLERANCE, known_keys, mixture_problems
from megatron_mergemix.config.prefixes import is_cut_apart, is_misread
from megatron_mergemix.config.problems import KeyPath, Problem, dotted, shown
from megatron_mergemix.config.search import search_problems
from megatron_mergemix.config.slurm import slurm_problems
from megatron_mergemix.config.words import word_problems

if TYPE_CHECKING:
    from megatron_mergemix.config import Config

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_NUMBER = re.compile(r"\d+\.?\d*|\.\d+")


def cross_field_problems(config: Config) -> list[Problem]:
    """Return every rule that the settings break together, in the order of the YAML."""
    return [
        *_names(config),
        *_homes(config),
        *_base_and_model(config),
        *_tokenizer(config),
        *_prefixes(config),
        *_bounds(config),
        *group_problems(config),
        *_mixtures(config),
        *_experts(config),
        *_runs(config),
        *capability_problems(config),
        *layout_problems(config),
        *search_problems(config),
        *_blend(config),
        *slurm_problems(config),
    ]


def _names(config: Config) -> Iterator[Problem]:
    groups: tuple[tuple[KeyPath, Iterable[str]], ...] = (
        (("domains",), config.domains),
        (("experts", "components"), config.experts.components),
        (("groups",), config.groups),
        (("evaluate", "capabilities"), config.evaluate.capabilities),
        (("references",), config.references),
    )
    for path, names in groups:
        for name in names:
            if not _NAME.fullmatch(name):
                yield Problem(
                    (*path, name),
                    "is not a usable name, expected letters, digits, '_' and '-' only "
                    "(names become folder names)",
                )
    if len(config.domains) < 2:
        yield Problem(("domains",), f"has {len(config.domains)}, expected at least 2 to mix")
    if not config.evaluate.capabilities:
        yield Problem(("evaluate", "capabilities"), "is empty, expected at least one")


def _homes(config: Config) -> Iterator[Problem]:
    """Find paths that begin with ``~``, which only a shell expands."""
    paths: dict[KeyPath, object] = {
        ("run_dir",): config.run_dir,
        ("tokenizer", "path"): config.tokenizer.path,
        ("base", "checkpoint"): config.base.checkpoint,
        **{("experts", "checkpoints", n): path for n, path in config.experts.checkpoints.items()},
    }
    for path, value in paths.items():
        if str(value).startswith("~"):
            yield Problem(path, f"is {shown(str(value))}, expected a whole path: ~ is not expanded")


def _base_and_model(config: Config) -> Iterator[Problem]:
    base = config.base
    if (base.checkpoint is None) == (base.train is None):
        found = "neither" if base.train is None else "both"
        yield Problem(("base",), f"has {found}, expected exactly one of checkpoint and train")
    if config.launch.kind == "builtin":
        if config.model is None:
            yield Problem(
                ("model",), "is missing: the built-in trainer and search build the model from it"
            )
        if config.launch.command is not None:
            yield Problem(("launch", "command"), "is given, but launch.kind is builtin")
        return
    if base.train is not None:
        yield Problem(
            ("base", "train"),
            "is given, but only the built-in trainer makes a base; with launch.kind command name "
            "your own in base.checkpoint",
        )
    if config.model is not None:
        yield Problem(
            ("model",),
            "is given, but with launch.kind command the model comes from the launch's arguments; "
            "leave the section away",
        )
    if config.parallel != type(config.parallel)():
        yield Problem(
            ("parallel",),
            "is given, but with launch.kind command the layout comes from the launch's arguments; "
            "leave the section away",
        )
    training, usual = config.training, type(config.training)()
    for name in type(training).model_fields:
        if name != "save_interval" and getattr(training, name) != getattr(usual, name):
            yield Problem(
                ("training", name),
                f"is {getattr(training, name)}, but with launch.kind command it comes from the "
                "launch's arguments; of this section only save_interval is read",
            )
    if config.launch.command is not None:
        yield from word_problems(("launch", "command"), config.launch.command)


def _tokenizer(config: Config) -> Iterator[Problem]:
    tokenizer = config.tokenizer
    if tokenizer.kind == "huggingface" and tokenizer.path is None:
        yield Problem(("tokenizer", "path"), "is missing: kind huggingface reads it from a folder")
    if tokenizer.kind == "byte" and tokenizer.path is not None:
        yield Problem(
            ("tokenizer", "path"),
            f"is {shown(str(tokenizer.path))} but kind byte has no files; set kind: huggingface "
            "or leave path away",
        )
    is_launch, tasks = config.launch.kind == "command", config.evaluate.lm_evals
    if is_launch and tasks and "tokenizer" not in config.model_fields_set:
        yield Problem(
            ("tokenizer",),
            f"is missing: the launch has its own, but tasks of lm-eval ({next(iter(tasks))}) "
            "become tokens here. Name the same one: {kind: huggingface, path: FOLDER}, or "
            "{kind: byte}",
        )
    size = config.model.vocab_size if config.model else None
    if tokenizer.kind == "byte" and size is not None and size < BYTE_VOCAB:
        yield Problem(
            ("model", "vocab_size"),
            f"is {size}, expected at least {BYTE_VOCAB}: 256 bytes and the end of document",
        )


def _prefixes(config: Config) -> Iterator[Problem]:
    owners: dict[str, str] = {}
    for name, domain in config.domains.items():
        path: KeyPath = ("domains", name, "prefixes")
        yield from _prefix_list(path, list(domain.prefixes))
        for prefix in domain.prefixes:
            place = os.path.realpath(prefix)
            other = owners.setdefault(place, name)
            if other != name:
                yield Problem(
                    path,
                    f"has {shown(prefix)}, which is in {dotted(domain_path(config, other))} too; "
                    "the shares of two "
                    "domains with common data mean nothing",
                )
        if isinstance(domain.prefixes, dict):
            for prefix, weight in domain.prefixes.items():
                if weight <= 0:
                    yield Problem(
                        (*path, prefix), f"is {weight:g}, expected a weight greater than 0"
                    )
    for name, task in config.evaluate.losses.items():
        path = ("evaluate", "capabilities", name, "loss", "prefixes")
        yield from _prefix_list(path, task.prefixes)
        for prefix in task.prefixes:
            owner = owners.get(os.path.realpath(prefix))
            if owner:
                yield Problem(
                    path,
                    f"has {shown(prefix)}, which {dotted(domain_path(config, owner))} trains on; "
                    "expected data that training never sees",
                )


def _prefix_list(path: KeyPath, prefixes: list[str]) -> Iterator[Problem]:
    if not prefixes:
        yield Problem(path, "is empty, expected at least one dataset prefix")
    seen = set()
    for prefix in prefixes:
        if is_cut_apart(prefix):
            yield Problem(
                path,
                f"has {shown(prefix)}, expected no blanks: Megatron splits its list of datasets "
                "at blanks",
            )
        if prefix.startswith("~"):
            yield Problem(path, f"has {shown(prefix)}, expected a whole path: ~ is not expanded")
        if prefix.endswith((".bin", ".idx")):
            yield Problem(
                path, f"has {shown(prefix)}, expected the name without {shown(prefix[-4:])}"
            )
        if is_misread(prefix):
            yield Problem(
                path,
                f"has {shown(prefix)}, which Megatron reads as an option or a weight; "
                f"write './{prefix}'",
            )
        if os.path.realpath(prefix) in seen:
            yield Problem(path, f"has {shown(prefix)} twice")
        seen.add(os.path.realpath(prefix))


def _bounds(config: Config) -> Iterator[Problem]:
    least = greatest = 0.0
    for name, domain in config.domains.items():
        low, high = domain.bounds
        least, greatest = least + low, greatest + high
        if low > high:
            yield Problem(
                ("domains", name, "bounds"),
                f"is [{low:g}, {high:g}], expected the least share first",
            )
    if least > 1 + SUM_TOLERANCE:
        yield Problem(
            ("domains",),
            f"have lower bounds that sum to {least:g}, expected at most 1: no mixture fits",
        )
    if config.domains and greatest < 1 - SUM_TOLERANCE:
        yield Problem(
            ("domains",),
            f"have upper bounds that sum to {greatest:g}, expected at least 1: no mixture fits",
        )


def _mixtures(config: Config) -> Iterator[Problem]:
    mixtures: dict[KeyPath, object] = {
        ("experts", "general_mixture"): config.experts.general_mixture,
        **{("experts", "components", n): row for n, row in config.experts.components.items()},
        **{("references", name): mixture for name, mixture in config.references.items()},
    }
    if config.base.train:
        mixtures["base", "train", "mixture"] = config.base.train.mixture
    for path, mixture in mixtures.items():
        if isinstance(mixture, dict):
            yield from mixture_problems(path, mixture, config.domains)


def _experts(config: Config) -> Iterator[Problem]:
    yield from _components(config)
    given = config.experts.checkpoints
    path: KeyPath = ("experts", "checkpoints")
    yield from known_keys(path, given, config.expert_names, "expert")
    missing = [name for name in config.expert_names if name not in given]
    if given and missing:
        yield Problem(
            path,
            f"lacks {', '.join(missing)}; expected a checkpoint for every expert, or none at all",
        )


def _components(config: Config) -> Iterator[Problem]:
    experts, num_domains = config.experts, len(config.domains)
    for name in ("general_share", "general_mixture"):
        is_given = getattr(experts, name) is not None
        if experts.components and is_given:
            yield Problem(
                ("experts", name),
                "is given, but experts.components says what every expert is trained on; "
                "leave one of them away",
            )
        if not experts.components and not is_given:
            yield Problem(("experts", name), "is nothing; leave it away for its default")
    if experts.general_share == 0 and experts.general_mixture != "uniform":
        yield Problem(
            ("experts", "general_mixture"),
            "is given, but experts.general_share is 0; leave one of them away",
        )
    if 0 < len(experts.components) < num_domains:
        yield Problem(
            ("experts", "components"),
            f"has {len(experts.components)}, expected at least {num_domains}, as many as there "
            "are domains: fewer experts cannot stand for every mixture. Add components, or join "
            "domains",
        )


def _runs(config: Config) -> Iterator[Problem]:
    """Check that warm-up and averaging fit into the steps of the runs."""
    if config.model is None:
        return
    base = config.base.train
    if base is not None:
        yield from _warmup(("base", "train"), base.warmup_steps, config.steps(base.tokens))
    if config.experts.checkpoints:
        return
    steps = config.steps(config.experts.tokens)
    yield from _warmup(("experts",), config.experts.warmup_steps, steps)
    saves = math.ceil(steps / config.training.save_interval)
    if (config.experts.average_last or 1) > saves:
        yield Problem(
            ("experts", "average_last"),
            f"is {config.experts.average_last}, but {steps} steps with training.save_interval "
            f"{config.training.save_interval} make {saves} saves; lower save_interval",
        )


def _warmup(path: KeyPath, warmup: int, steps: int) -> Iterator[Problem]:
    if warmup >= steps:
        yield Problem(
            (*path, "warmup_steps"),
            f"is {warmup}, expected less than the {steps} steps that {dotted(path)}.tokens make",
        )


def _blend(config: Config) -> Iterator[Problem]:
    if config.blend.train_tokens is None:
        for name, domain in config.domains.items():
            if domain.max_epochs is not None:
                yield Problem(
                    ("domains", name, "max_epochs"),
                    "needs blend.train_tokens: epochs are counted over the tokens of the big run",
                )
    parts = [part.strip() for part in config.blend.split.split(",")]
    numbers = all(_NUMBER.fullmatch(part) for part in parts)
    if not numbers or len(parts) > 3 or float(parts[0]) == 0:
        yield Problem(
            ("blend", "split"),
            f"is {shown(config.blend.split)}, expected up to three numbers for training, "
            "validation and test with some training, such as '99,1,0'",
        )
