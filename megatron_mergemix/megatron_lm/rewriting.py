"""Arguments of Megatron-LM that a stage replaces, and the table that says so."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from typing import Any

_ABSENT = object()
_LONGEST = 60

_FLAGS = {
    "microbatch_group_size_per_vp_stage": "microbatch-group-size-per-virtual-pipeline-stage",
    "fp8": "fp8-format",
    "fp4": "fp4-format",
}
"""Flags that are not called as what they set."""


NO_OTHER_DATA: Mapping[str, Any] = {
    "data_args_path": None,
    "per_split_data_args_path": None,
    "train_data_path": None,
    "valid_data_path": None,
    "test_data_path": None,
    "mock_data": False,
}
"""Every other way to name data, which Megatron-LM might prefer or refuse beside ``--data-path``."""


class Rewriting:
    """Sets arguments and remembers what they were."""

    def __init__(self) -> None:
        """Start with nothing replaced."""
        self._changes: dict[str, tuple[Any, Any]] = {}

    def apply(self, args: argparse.Namespace, **values: Any) -> None:
        """Set arguments by name; one that this Megatron-LM does not have may only be unset.

        Megatron-LM parses its arguments up to three times; the table shows the first change.
        """
        for name, value in values.items():
            old = getattr(args, name, _ABSENT)
            if old is _ABSENT:
                assert not value, f"this Megatron-LM has no argument {name}"
                continue
            setattr(args, name, value)
            first, _ = self._changes.get(name, (old, None))
            self._changes[name] = (first, value)

    def table(self) -> str:
        """Return a line per argument that is not what it was: its flag, old and new value."""
        rows = [
            (f"--{flag_of(name)}", _shown(old), _shown(new))
            for name, (old, new) in self._changes.items()
            if (old or None) != (new or None)
        ]
        if not rows:
            return "no argument is replaced"
        wide = [max(len(row[column]) for row in rows) for column in (0, 1)]
        return "\n".join(f"  {flag:{wide[0]}}  {old:{wide[1]}} -> {new}" for flag, old, new in rows)


def flag_of(name: str) -> str:
    """Return what the command line calls an argument, without the dashes in front."""
    return _FLAGS.get(name, name.replace("_", "-"))


def _shown(value: Any) -> str:
    if value is None or value is False:
        return "-"
    text = shlex.join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
