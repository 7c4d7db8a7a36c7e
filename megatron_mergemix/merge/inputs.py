"""Checks of what is merged, before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_mergemix.checkpoint.checks import check_compatible, check_intact
from megatron_mergemix.checkpoint.extra_state import check_extra_states
from megatron_mergemix.checkpoint.index import CheckpointIndex
from megatron_mergemix.checkpoint.legacy import CONVERT, LegacyIndex, check_layouts
from megatron_mergemix.checkpoint.opening import open_checkpoint
from megatron_mergemix.errors import CheckpointError
from megatron_mergemix.merge.engine import FLOATS

COPIED = ("int64", "int32", "int16", "bool")
"""Dtypes of counters, which are taken from the base. Smaller integers and fp8 are quantised."""

ELEMENTWISE = ("linear", "task_arithmetic")
"""Methods that do not care which part of a tensor they see."""


def opened(path: Path) -> CheckpointIndex:
    """Return the index of a checkpoint whose files are all there.

    Raises:
        CheckpointError: it is missing, damaged, or of a format that cannot be merged.
    """
    index = open_checkpoint(path)
    check_intact(index)
    if (index.path / "modelopt_state").is_dir():
        raise CheckpointError(
            f"{index.path} is of a model that ModelOpt has changed (modelopt_state): its scales "
            "and masks are no weights, and a merge without that folder would be another model. "
            "Merge the models from before, and quantise or prune the merge."
        )
    return index


def check_inputs(
    base: CheckpointIndex,
    experts: Mapping[str, CheckpointIndex],
    method: str,
    vocab_size: int | None,
    torch_dist_only: Sequence[str],
) -> None:
    """Check that the experts fit the base, and that the rest fits them all.

    Args:
        base: gives format and layout.
        experts: name -> checkpoint.
        method: how they are merged.
        vocab_size: see :func:`~.checkpoint.checks.check_compatible`.
        torch_dist_only: flags that are set and mean nothing to legacy checkpoints.

    Raises:
        CheckpointError: says what does not fit, or what in the base cannot be merged or copied.
    """
    check_layouts(base, experts)
    if isinstance(base, LegacyIndex):
        _check_legacy(base, method, torch_dist_only)
        check_compatible(base, experts)  # where padding begins differs from rank to rank
    else:
        check_compatible(base, experts, vocab_size)
    _check_dtypes(base)
    check_extra_states(base)


def _check_legacy(base: LegacyIndex, method: str, flags: Sequence[str]) -> None:
    """Check that a merge of legacy checkpoints asks for nothing that they cannot give."""
    what = f"{base.path} is in the legacy torch format: "
    if method not in ELEMENTWISE and len(base.ranks) > 1:
        raise CheckpointError(
            f"{what}its {len(base.ranks)} ranks hold parts and copies of tensors, and "
            f"{method} looks at whole ones. Merge with --method linear or "
            f"task_arithmetic, or {CONVERT}."
        )
    if flags:
        raise CheckpointError(f"{what}{flags[0]} is for torch_dist only. Drop it, or {CONVERT}.")


def _check_dtypes(base: CheckpointIndex) -> None:
    for name, tensor in base.model_tensors().items():
        if tensor.dtype not in FLOATS + COPIED:
            raise CheckpointError(
                f"{name} of {base.path} is {tensor.dtype}: quantised parameters cannot be "
                "merged. Save the checkpoints without FP8 parameters."
            )
