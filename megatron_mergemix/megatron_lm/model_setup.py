"""The moment at which Megatron-LM builds the model and loads its weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_mergemix.checkpoint.checks import VOCABULARY_TENSORS
from megatron_mergemix.checkpoint.metadata import read_index
from megatron_mergemix.errors import ConfigError


@contextmanager
def wrapped_setup(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replace Megatron-LM's ``setup_model_and_optimizer`` for the time of a ``pretrain``."""
    training: Any = sys.modules["megatron.training.training"]
    original = training.setup_model_and_optimizer
    training.setup_model_and_optimizer = wrap(original)
    try:
        yield
    finally:
        training.setup_model_and_optimizer = original


def padded_vocab_size() -> int:
    """Return the rows of the embedding that this launch builds, padding included."""
    from megatron.training import get_args

    return int(get_args().padded_vocab_size)


def check_vocabulary(base: Path) -> None:
    """Check that the base has as many vocabulary rows as this launch builds.

    Megatron-LM fills missing rows with zeros when it loads a checkpoint that was padded otherwise:
    they take part in the softmax, and the merge of such experts is refused later.

    Raises:
        ConfigError: it has not; says which padding would do.
    """
    rows = padded_vocab_size()
    tensors = read_index(base).model_tensors()
    for name in VOCABULARY_TENSORS:
        if name in tensors and tensors[name].shape[0] != rows:
            raise ConfigError(
                f"this launch pads the vocabulary to {rows} rows, the base ({base}) has "
                f"{tensors[name].shape[0]}. Megatron-LM pads to a multiple of "
                "--make-vocab-size-divisible-by times the tensor-parallel size: set the former so "
                "that both agree."
            )
