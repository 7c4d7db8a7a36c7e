"""A command that measures how far a candidate is from the base, and misbehaves when it is told to.

``python distance_command.py HOME BASE CHECKPOINT OUTPUT``. It counts its calls in HOME; a file
``HOME/<call>`` holds what that call does wrong: ``hang``, ``exit``, ``no json``, ``no metric``.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from megatron_mergemix.checkpoint.archive import stored_tensor
from megatron_mergemix.checkpoint.metadata import read_index


def main(home: Path, base: Path, checkpoint: Path, output: Path) -> None:
    """Write ``{"distance": {"l2": ...}, "tensors": ...}``."""
    count = home / "calls"
    call = int(count.read_text()) + 1 if count.exists() else 1
    count.write_text(str(call))
    wish = home / str(call)
    fault = wish.read_text() if wish.exists() else ""
    print(f"call {call} {fault}", flush=True)
    if fault == "hang":
        time.sleep(600)
    if fault == "exit":
        sys.exit(3)
    if fault == "no json":
        output.write_text("half of")
    elif fault == "no metric":
        output.write_text('{"other": 1}')
    else:
        output.write_text(json.dumps(measured(base, checkpoint / "release")))


def measured(base: Path, candidate: Path) -> dict[str, object]:
    """Return the norm of the difference of all fp32 weights."""
    first, second = weights(base), weights(candidate)
    square = sum(float(np.square(second[name] - first[name]).sum()) for name in first)
    return {"distance": {"l2": square**0.5}, "tensors": len(first)}


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Return the fp32 model tensors; without torch, whose import takes seconds of every call."""
    found = {}
    for name, tensor in read_index(folder).model_tensors().items():
        if tensor.dtype != "float32":
            continue
        whole = found[name] = np.empty(tensor.shape)
        for chunk in tensor.chunks:
            content = (folder / chunk.file).read_bytes()
            with (folder / chunk.file).open("rb") as file:
                stored = stored_tensor(file.fileno(), chunk.file_offset, chunk.length)
            steps = [4 * stride for stride in stored.strides]
            box = np.ndarray(stored.sizes, "<f4", content, stored.position, steps)
            places = zip(chunk.offsets, chunk.sizes, strict=True)
            whole[tuple(slice(start, start + size) for start, size in places)] = box
    return found


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
