"""TensorBoard's files, written without torch."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Scalar = tuple[str, float, int]
"""Tag, value, step."""


def replace_events(
    folder: Path, scalars: Iterable[Scalar], images: Iterable[tuple[str, bytes]] = ()
) -> None:
    """Write numbers and pictures to a TensorBoard folder in place of those that are there.

    Args:
        folder: of one run of TensorBoard.
        scalars: in any order.
        images: tag and PNG; they stand at step 0.

    Raises:
        OSError: the folder cannot be written.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()  # the writer's own thread would fail unheard
    for stale in folder.glob("events.out.tfevents.*"):
        stale.unlink()
    writer = EventFileWriter(str(folder))
    for tag, value, step in scalars:
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        writer.add_event(_event(summary, step))
    for tag, png in images:
        image = Summary.Image(encoded_image_string=png)
        writer.add_event(_event(Summary(value=[Summary.Value(tag=tag, image=image)]), 0))
    writer.close()


def _event(summary: Any, step: int) -> Any:
    from tensorboard.compat.proto.event_pb2 import Event

    return Event(wall_time=time.time(), step=step, summary=summary)
