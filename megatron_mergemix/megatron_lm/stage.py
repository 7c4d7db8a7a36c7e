"""What every stage can do with a launch, and how it says that there is nothing left to do."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from megatron_mergemix.config import Config
from megatron_mergemix.megatron_lm.rewriting import Rewriting

Pretrain = Callable[..., Any]


class NothingToDo(Exception):
    """The stage was finished by an earlier launch; the message says so."""


class Stage:
    """One stage in one process: every rank has one, and all of them decide alike.

    Attributes:
        config: the experiment, with what earlier launches put on record about the model.
        rewriting: the arguments replaced so far.
    """

    name: str
    """What ``--mergemix-stage`` calls it."""
    lock_name: str
    """What a second launch of the same must not get."""
    trains = True
    """Whether Megatron-LM trains; where it does not, ranks wait for each other without limit."""

    def __init__(self, config: Config) -> None:
        """Prepare; no file is written."""
        self.config = config
        self.rewriting = Rewriting()

    def after_parsing(self, args: argparse.Namespace) -> None:
        """Replace what must be known before ``--use-checkpoint-args`` is looked at.

        Called for every parse of the command line; Megatron-LM makes up to three.
        """

    def before_validation(self, args: argparse.Namespace) -> None:
        """Replace the other arguments. Called once, before any process group is there.

        Raises:
            NothingToDo: an earlier launch finished this stage.
        """

    def around(self, pretrain: Pretrain) -> Pretrain:
        """Return what runs in place of Megatron-LM's ``pretrain``."""
        return pretrain


def is_rank_0() -> bool:
    """Return whether this is rank 0, before there is a process group."""
    return int(os.environ.get("RANK", "0")) == 0
