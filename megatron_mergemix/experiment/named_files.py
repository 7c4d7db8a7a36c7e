"""Checks the files that a configuration names: datasets, tokenizer, checkpoints. No torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_mergemix.checkpoint.checks import check_compatible, check_intact
from megatron_mergemix.checkpoint.metadata import read_index
from megatron_mergemix.checkpoint.saves import resolve
from megatron_mergemix.config import Config
from megatron_mergemix.config.groups import domain_path
from megatron_mergemix.config.problems import MAX_PROBLEMS, dotted
from megatron_mergemix.data.blend import check_parts
from megatron_mergemix.data.indexed import IndexedDataset
from megatron_mergemix.data.sidecar import read_sidecar
from megatron_mergemix.data.tokenizers import load_tokenizer
from megatron_mergemix.errors import BlendError, ConfigError, DataError, MergeMixError
from megatron_mergemix.evaluate.windows import loss_windows
from megatron_mergemix.model_facts import is_known, model_facts
from megatron_mergemix.training_runs.mixtures import component_matrix

_Problem = tuple[str, MergeMixError]
_NAMES = ("model.seq_length", "--seq-length")


@dataclass(frozen=True)
class PrefixCount:
    """What one dataset holds.

    Attributes:
        prefix: path without ``.bin`` and ``.idx``.
        documents: in the whole dataset.
        tokens: in the whole dataset.
        train_tokens: in the training part of ``blend.split``.
    """

    prefix: str
    documents: int
    tokens: int
    train_tokens: int


def check_files(config: Config) -> dict[str, list[PrefixCount]]:
    """Check every file that the settings name and return what the domains hold.

    Raises:
        DataError: a dataset is missing, damaged, made with another tokenizer, or too small.
        CheckpointError: a checkpoint is missing, incomplete or damaged, or the experts do not
            have the base's tensors.
        BlendError: a dataset is too small for its part of ``blend.split``.
        ConfigError: the tokenizer's folder is missing, or no tokenizer can be loaded from it; the
            experts' training mixtures are too much alike.
            All problems are listed; the class is that of the first.
    """
    problems: list[_Problem] = []
    domains: dict[str, list[PrefixCount]] = {}
    # Loading a tokenizer takes a while; it is done once, and only where a sidecar asks for it.
    digest = functools.cache(lambda: load_tokenizer(config.tokenizer).digest())
    for name in config.domains:
        domains[name] = _count_domain(config, name, digest, problems)
    problems += _heldout_problems(config, digest)
    problems += _folder_problems(config)
    if problems:
        texts = [f"{where}: {error}" for where, error in problems]
        more = len(texts) - MAX_PROBLEMS
        if len(texts) > 1:
            texts = [f"{len(texts)} problems with the files:", *texts[:MAX_PROBLEMS]]
        if more > 0:
            texts.append(f"and {more} more")
        raise type(problems[0][1])("\n  ".join(texts))
    component_matrix(config)  # may take the tokens of the datasets, so it comes last
    return domains


def _count_domain(
    config: Config, name: str, digest: Callable[[], str], problems: list[_Problem]
) -> list[PrefixCount]:
    """Return the counts of one domain's datasets; add what is wrong with them to ``problems``."""
    counts = []
    before = len(problems)
    where = dotted((*domain_path(config, name), "prefixes"))
    for prefix in config.domains[name].prefixes:
        try:
            dataset = IndexedDataset(prefix)
            train_tokens = dataset.tokens_in_split(config.blend.split, "train")
            _check_tokenizer(config, prefix, digest)
            if train_tokens > 0:  # else it is no part of any blend
                check_parts([prefix], config.blend.split)
        except (DataError, BlendError) as error:
            problems.append((where, error))
            continue
        if train_tokens == 0 and isinstance(config.domains[name].prefixes, dict):
            problems.append(
                (
                    where,
                    DataError(
                        f"{prefix} has a weight, but none of its {dataset.num_sequences} sequences "
                        f"is in the training part of blend.split {config.blend.split!r}."
                    ),
                )
            )
        counts.append(PrefixCount(prefix, dataset.num_documents, dataset.num_tokens, train_tokens))
    total = sum(count.train_tokens for count in counts)
    length = model_facts(config).seq_length if is_known(config) else None
    if len(problems) == before and length is not None and total <= length:
        problems.append(
            (
                where,
                DataError(
                    f"{total} tokens in the training part of blend.split {config.blend.split!r}, "
                    f"expected more than {_NAMES[config.model is None]} {length}: not one "
                    "training sample."
                ),
            )
        )
    return counts


def _check_tokenizer(config: Config, prefix: str, digest: Callable[[], str]) -> None:
    """Check what the sidecar, if there is one, tells about the tokenizer.

    Raises:
        DataError: the tokens are not those of the configured tokenizer.
    """
    sidecar = read_sidecar(prefix)
    if sidecar is None:
        return
    made_with = sidecar.tokenizer
    if made_with["kind"] != config.tokenizer.kind:
        raise DataError(
            f"{prefix} was made with tokenizer kind {made_with['kind']}, but tokenizer.kind is "
            f"{config.tokenizer.kind}."
        )
    size = config.model.vocab_size if config.model else None
    if size is not None and made_with["vocab_size"] > size:
        raise DataError(
            f"{prefix} was made with a vocabulary of {made_with['vocab_size']} tokens, but "
            f"model.vocab_size is {size}."
        )
    folder = config.tokenizer.path
    # Of byte tokenizers there is but one; a folder that is missing is a problem of its own.
    if folder is not None and folder.is_dir() and made_with["digest"] != digest():
        raise DataError(
            f"{prefix} was made with another tokenizer ({made_with['path']}, digest "
            f"{made_with['digest']}) than that in tokenizer.path {folder}, digest {digest()}. "
            "Name the tokenizer it was made with, or make the dataset again."
        )


def _heldout_problems(config: Config, digest: Callable[[], str]) -> Iterator[_Problem]:
    length = model_facts(config).seq_length if is_known(config) else None
    for name, task in config.evaluate.losses.items():
        where = dotted(("evaluate", "capabilities", name, "loss"))
        try:
            for prefix in task.prefixes:
                IndexedDataset(prefix)
                _check_tokenizer(config, prefix, digest)
            if length is not None:
                loss_windows(task, length)
        except DataError as error:
            yield where, error


def _folder_problems(config: Config) -> Iterator[_Problem]:
    tokenizer = config.tokenizer.path
    if tokenizer is not None and not tokenizer.is_dir():
        yield (
            "tokenizer.path",
            ConfigError(f"{tokenizer} is no folder, expected that of a Hugging Face tokenizer."),
        )
    given = {f"experts.checkpoints.{name}": at for name, at in config.experts.checkpoints.items()}
    if config.base.checkpoint is not None:
        given = {"base.checkpoint": config.base.checkpoint, **given}
    indexes = {}
    for where, path in given.items():
        try:
            indexes[where] = read_index(resolve(path))
            check_intact(indexes[where])
        except MergeMixError as error:
            yield where, error
    base = indexes.pop("base.checkpoint", None)
    if base is None:
        return
    for where, index in indexes.items():
        try:
            check_compatible(base, {where.removeprefix("experts.checkpoints."): index})
        except MergeMixError as error:
            yield where, error
