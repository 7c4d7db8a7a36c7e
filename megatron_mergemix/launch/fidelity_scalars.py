"""The fidelity of proxies as TensorBoard scalars, written without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_mergemix.files.event_files import replace_events


def write_scalars(folder: Path, result: Mapping[str, Any]) -> None:
    """Write every number of the fidelity at the step that is the number of references.

    Args:
        folder: of TensorBoard; what an earlier comparison wrote there goes.
        result: see :mod:`megatron_mergemix.validation.fidelity`.
    """
    step = len(result["references"])
    found = _scalars(result["fidelity"], "fidelity")
    replace_events(folder, ((tag, value, step) for tag, value in found))


def _scalars(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """Yield ``fidelity/overall/spearman`` and so on; an interval as its two ends."""
    for name, value in values.items():
        tag = f"{prefix}/{name}"
        if isinstance(value, Mapping):
            yield from _scalars(value, tag)
        elif isinstance(value, list):
            yield from zip((f"{tag}/low", f"{tag}/high"), value, strict=True)
        elif value is not None:
            yield tag, float(value)
