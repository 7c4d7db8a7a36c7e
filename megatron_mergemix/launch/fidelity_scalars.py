"""The fidelity of proxies as TensorBoard scalars, written without torch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def write_scalars(folder: Path, result: Mapping[str, Any]) -> None:
    """Write every number of the fidelity at the step that is the number of references.

    Args:
        folder: of TensorBoard; what an earlier comparison wrote there goes.
        result: see :mod:`megatron_mergemix.study.fidelity`.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    shutil.rmtree(folder, ignore_errors=True)
    writer = EventFileWriter(str(folder))
    step = len(result["references"])
    for tag, value in _scalars(result["fidelity"], "fidelity"):
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        writer.add_event(Event(step=step, summary=summary))
    writer.close()


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
